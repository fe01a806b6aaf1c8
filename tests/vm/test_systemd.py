"""The units under a real systemd, installed as the README says: no guest sees what an administrator does by habit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import ROOT
from tests.support.leftovers import all_dying_with_us, can_have_all_die
from tests.vm.verdict import HarnessError, second_chance

IMAGE, SHIM = Path("build/vm/root.img"), Path("build/ptrace.so")
WELL, FAILED = ("all well\r\n", "FAILED\r\n")
MOST_OUTPUT = 4 << 20  # bytes; User-Mode Linux was seen to print without end
SECONDS = 600  # a guard against a hang; the first boot takes 114 to 175 beside other work

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(not can_have_all_die(), reason="no process namespace to be had, for the guest to die with"),
    pytest.mark.skipif(not shutil.which("linux.uml"), reason="no linux.uml (User-Mode Linux)"),
]


def boot(disk: Path, scenario: str, wheels: Path) -> None:
    """Boot a guest of User-Mode Linux that has *disk*, have it do the scenario, and return once it is powered off.

    AssertionError when something in the guest went wrong, HarnessError when the guest itself did.
    """
    script = disk.parent / scenario
    script.write_text(
        f"#!/bin/sh\ncd /host{ROOT} && exec python3 -B -m tests.vm.systemd.scenario {scenario} /host{wheels}\n"
    )
    script.chmod(0o755)
    kernel = [
        "linux.uml", "mem=512M", f"ubd0={disk},{ROOT / IMAGE}", "root=/dev/ubda", "rw", f"uml_dir={disk.parent}",
        "con=null", "con0=null,fd:1", "quiet", "systemd.show_status=0", f"scenario=/host{script}",
    ]  # fmt: skip
    # Its processes are traced ones, which would outlive it.
    command = all_dying_with_us(["timeout", "--signal=KILL", str(SECONDS), *kernel])
    environment = os.environ | {"LD_PRELOAD": str(ROOT / SHIM), "TMPDIR": "/dev/shm"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as guest:
        try:
            assert guest.stdout
            said = guest.stdout.read(MOST_OUTPUT).decode(errors="replace")
        finally:
            guest.kill()
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
    subprocess.run(all_dying_with_us(["make", "--silent", "-C", ROOT, IMAGE, SHIM]), check=True)

    def run() -> None:
        disk = disks / "disk"
        disk.unlink(missing_ok=True)
        boot(disk, "first", wheels)
        boot(disk, "second", wheels)

    second_chance(run)
