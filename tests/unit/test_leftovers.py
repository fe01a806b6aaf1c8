# SPDX-License-Identifier: BSD-3-Clause
"""What a run of the tests that was killed left is removed, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.harness import ROOT, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HOLD = "import sys, os, signal; from tests.support.leftovers import directory\nwith directory(sys.argv[1]) as path: "
DEAD = 2**22 + 1  # more than any process's number can be


def made(place: Path, name: str) -> Path:
    """A directory with a file in it."""
    path = place / name
    path.mkdir()
    (path / "file").touch()
    return path


def leftover(place: Path) -> Path:
    return made(place, f"tmemd-test-{DEAD}-abc_1234")


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    program = HOLD + "(path / 'file').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    (path,) = tmp_path.iterdir()
    assert (path / "file").exists()
    leftovers.sweep([tmp_path])
    assert not path.exists()


def test_what_a_killed_run_of_a_guest_left_is_removed() -> None:
    with subprocess.Popen([ROOT / "tests/vm/run", "nbd"], stdout=subprocess.PIPE, start_new_session=True) as run:
        places = Path("/var/tmp"), Path("/dev/shm")

        def left() -> list[Path]:
            return [path for place in places for path in place.glob(f"tmemd-test-{run.pid}-*")]

        wait_until(lambda: len(left()) == len(places) or run.poll() is not None, "its directories")
        os.killpg(run.pid, signal.SIGKILL)
        if run.wait() == 77:
            assert run.stdout
            pytest.skip(run.stdout.read().decode())

    def is_removed() -> bool:
        leftovers.sweep(places)
        return not left()

    wait_until(is_removed, "all that it started to be gone")


@pytest.mark.parametrize(
    "name", ["data", "results-2026", f"{DEAD}", f"{DEAD}-abc_12345", f"{DEAD}-abc.1234", "-abc_1234"]
)
def test_what_others_made_stays(tmp_path: Path, name: str) -> None:
    path = made(tmp_path, f"tmemd-test-{name}")
    leftovers.sweep([tmp_path])
    assert (path / "file").exists()


@needs_root
def test_another_user_s_directory_stays(tmp_path: Path) -> None:
    path = leftover(tmp_path)
    os.chown(path, 65534, 65534)
    leftovers.sweep([tmp_path])
    assert (path / "file").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path = made(tmp_path, "mine")
    link = tmp_path / f"tmemd-test-{DEAD}-abc_1234"
    link.symlink_to(path)
    leftovers.sweep([tmp_path])
    assert (link / "file").exists()


@needs_root
def test_what_is_mounted_in_a_leftover_stays(tmp_path: Path) -> None:
    path = leftover(tmp_path)
    (path / "mount").mkdir()
    subprocess.run(["mount", "--bind", made(tmp_path, "mine"), path / "mount"], check=True)
    try:
        leftovers.sweep([tmp_path])
        assert (path / "mount" / "file").exists()
    finally:
        subprocess.run(["umount", path / "mount"], check=True)
    leftovers.sweep([tmp_path])
    assert not path.exists()


def test_a_run_in_another_container_keeps_its_directory(tmp_path: Path) -> None:
    with leftovers.directory(tmp_path) as path:
        elsewhere = path.rename(tmp_path / f"tmemd-test-{DEAD}-abc_1234")  # where the process has another number
        leftovers.sweep([tmp_path])
        elsewhere.rename(path)
    assert not path.exists()


def test_a_directory_is_gone_after_its_block(tmp_path: Path) -> None:
    with leftovers.directory(tmp_path) as path:
        (path / "file").touch()
    assert not path.exists()
