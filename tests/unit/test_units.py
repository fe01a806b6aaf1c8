# SPDX-License-Identifier: BSD-3-Clause
"""systemd's units, as far as they go without a systemd; tests/vm/test_systemd.py runs them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.harness import ROOT

UNITS = ROOT / "scripts" / "systemd"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize(
    ("unit", "instance"),
    [
        ("tmemd.service",) * 2,
        ("tmemd-libvirt.service",) * 2,
        ("tmemd-device@.service", "tmemd-device@w.service"),
    ],
)
def test_exposure_is_at_most_3(tmp_path: Path, unit: str, instance: str) -> None:
    shutil.copy(UNITS / unit, tmp_path / instance)
    command = ["systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=30", str(tmp_path / instance)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (
            {"SIZE": "8G", "OPTIONS": "lost=zero watermark=10%"},
            ["size=8G", "backing=/b c", "lost=zero", "watermark=10%"],
        ),
        ({"SOURCE": "/i m", "OPTIONS": "write=through"}, ["source=/i m", "write=through"]),
        ({"SOURCE": "/i m"}, ["source=/i m"]),
    ],
)
def test_a_device_is_what_its_settings_say(tmp_path: Path, settings: dict[str, str], keys: list[str]) -> None:
    (tmp_path / "tmemctl").write_text("#!/bin/sh\necho /plugin.py\n")
    (tmp_path / "nbdkit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for command in tmp_path.iterdir():
        command.chmod(0o755)
    unit = (UNITS / "tmemd-device@.service").read_text().replace("\\\n", "").replace("%i", "web")
    (line,) = re.findall("^ExecStart=(.*)", unit, re.MULTILINE)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BACKING": "/b c"} | settings
    said = subprocess.check_output(shlex.split(line), env=environment, text=True).splitlines()
    common = ["tmemd=/run/tmemd/tmemd.sock", "pools=/run/tmemd/pools"]
    kind = [key for key in keys if key.startswith(("size=", "backing=", "source="))]
    assert said == ["-f", "python", "/plugin.py", "name=web", *kind, *common, *keys[len(kind) :]]
