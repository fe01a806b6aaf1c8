# SPDX-License-Identifier: BSD-3-Clause
"""An installed tmemd finds its plugin without the source tree."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import tmemd
from tests.support.harness import PLUGIN, ROOT


def test_the_plugin_is_found_in_the_source_tree() -> None:
    assert tmemd.plugin_path() == PLUGIN


def test_a_wheel_carries_plugin_and_core(tmp_path: Path) -> None:
    options = ["-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    look = "import tmemd, tmemd.binding._core as core; print(tmemd.plugin_path(), core.__file__)"
    run = [sys.executable, "-c", look]
    done = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    plugin, core = done.stdout.split()
    assert plugin == f"{tmp_path}/tmemd/plugin/tmem.py"
    assert core.startswith(f"{tmp_path}/tmemd/binding/_core.")
    # No PATH leads nbdkit's Python there; what tmemd needs is elsewhere here.
    bare = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": sysconfig.get_path("platlib")}
    done = subprocess.run(
        ["nbdkit", "python", plugin, "--dump-plugin"], env=bare, capture_output=True, text=True, check=True
    )
    assert "tmem_keys=name," in done.stdout
