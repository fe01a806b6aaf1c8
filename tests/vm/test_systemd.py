# SPDX-License-Identifier: BSD-3-Clause
"""The units under a real systemd, installed from the source tree: no guest sees what an administrator does by habit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import uml
from tests.support.harness import ROOT
from tests.support.verdict import HarnessError, second_chance

IMAGE = "build/vm/root.img"
WELL, FAILED = ("all well\r\n", "FAILED\r\n")
SECONDS = 600  # a guard against a hang; the first boot takes 114 to 175 beside other work

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(2700),
    *uml.needs_uml,
]


def boot(disk: Path, other: Path, scenario: str, wheels: Path) -> None:
    """Boot a guest of User-Mode Linux that has *disk*, have it do the scenario, and return once it is powered off.

    *other* is a disk without anything on it.
    AssertionError when something in the guest went wrong, HarnessError when the guest itself did.
    """
    said = uml.debian(
        disk.parent, "mem=512M", f"ubd0={disk},{ROOT / IMAGE}", f"ubd1={other}", "root=/dev/ubda", "rw",
        script=f"cd /host{ROOT} && exec python3 -B -m tests.vm.systemd.scenario {scenario} /host{wheels}",
        seconds=SECONDS,
    )  # fmt: skip
    print(said)
    if WELL not in said:
        if FAILED in said:
            raise AssertionError(said[said.index(FAILED) :])
        raise HarnessError("the guest did not come to an end")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of wheels: of the source tree, and of all that it needs."""
    path = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "-w", str(path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_no_request_fails_whatever_is_done_with_the_units(disks: Path, wheels: Path) -> None:
    uml.make(IMAGE, "build/ptrace.so")

    def run() -> None:
        disk = disks / "disk"
        disk.unlink(missing_ok=True)
        other = disks / "other"
        other.write_bytes(bytes(8 << 20))
        boot(disk, other, "first", wheels)
        boot(disk, other, "second", wheels)

    second_chance(run)
