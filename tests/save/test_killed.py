# SPDX-License-Identifier: BSD-3-Clause
"""SIGKILL before every step of save and of restore, and while they are in the core: whole or not there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.harness import MIB, wait_until
from tests.support.reference import Reference
from tests.support.saving import SIZE, Host, fill, killed_after, killed_at
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError


@pytest.fixture
def host(pools: Path, tmp_path: Path) -> Host:
    """One with a device that is in use."""
    return Host(pools / "here", tmp_path / "web")


def used(host: Host) -> Reference:
    """Fill its device."""
    with host.device() as core:
        return fill(core)


def test_a_save_file_is_whole_or_not_there(host: Host, tmp_path: Path, pools: Path) -> None:
    truth = used(host)
    file, step = tmp_path / "file", 0
    while killed_at(step, lambda: host.ctl("save", "--whole", "web", str(file))):
        assert not file.exists() or host.ctl("save", "--whole", "web", str(file)) == 0
        step += 1
    assert step > 20
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("web", "web.map")] == ["file"]
    there = Host(pools / "there", tmp_path / "there")
    there.begin()
    assert there.ctl("restore", "web", str(file)) == 0
    assert there.content() == truth.whole()


def test_the_save_file_that_was_there_stays_until_the_new_one_is_whole(host: Host, tmp_path: Path) -> None:
    host.begin()
    file, step = tmp_path / "file", 0
    assert host.ctl("save", "web", str(file)) == 0
    before = file.read_bytes()
    used(host)
    while killed_at(step, lambda: host.ctl("save", "web", str(file))) and file.read_bytes() == before:
        step += 1
    now = file.read_bytes()
    assert step > 15
    assert len(now) > len(before)
    assert host.ctl("save", "web", str(file)) == 0
    assert file.read_bytes() == now


LOST = b"lost with the host"


def outcome(host: Host) -> bytes | None:
    """What the device is; None: nobody can serve it, for it is half restored."""
    try:
        return host.content()
    except OSError:
        return LOST
    except PoolError as error:
        assert "a restore of it was begun, and has not ended" in str(error)  # noqa: PT017
        return None


Kill = Callable[[Callable[[], int]], bool]


def restore_killed(kill: Kill, pools: Path, place: Path, file: Path, *, with_file: bool, reboot: bool) -> bytes | None:
    """Restore onto a new host, killed amid it, maybe with the host; then again if need be. Returns what there was."""
    with leftovers.directory(str(pools)) as directory:
        there = Host(directory / "there", place / "there" if with_file else None, 8 * MIB)
        there.begin()
        killed = kill(partial(there.ctl, "restore", "web", str(file)))
        if reboot:
            there.lose_pool()
        found = outcome(there)
        if found is None:
            assert there.ctl("restore", "web", str(file)) == 0
            assert there.ctl("check", "web") == 0
            assert there.content() == Path(f"{file}.content").read_bytes()
        for path in place.glob("there*"):
            path.unlink()
    return found if killed else b""


@pytest.fixture
def saved(host: Host, tmp_path: Path) -> Path:
    """A save file; beside it what the device was."""
    truth = used(host)
    assert host.ctl("save", "--whole", "web", str(tmp_path / "file")) == 0
    (tmp_path / "file.content").write_bytes(truth.whole())
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("with_file", "reboot"),
    [
        pytest.param(True, False, id="with a file"),
        pytest.param(True, True, id="and the host dies with it"),
        pytest.param(False, False, id="in RAM only"),
    ],
)
def test_a_device_is_as_it_was_before_or_as_it_was_saved_or_refuses(
    saved: Path, tmp_path: Path, pools: Path, with_file: bool, reboot: bool
) -> None:
    possible = {None, bytes(SIZE), LOST if reboot else Path(f"{saved}.content").read_bytes()}
    seen: set[bytes | None] = set()
    for step in range(1000):
        kill = partial(killed_at, step)
        found = restore_killed(kill, pools, tmp_path, saved, with_file=with_file, reboot=reboot)
        if found == b"":
            break
        seen.add(found)
    assert {None, bytes(SIZE)} <= seen <= possible
    assert step > 20


@pytest.mark.slow
def test_at_any_moment(saved: Path, tmp_path: Path, pools: Path) -> None:
    rng, seen = random.Random(1), set()
    for _ in range(60):
        kill = partial(killed_after, rng.random() * 0.05)
        seen.add(restore_killed(kill, pools, tmp_path, saved, with_file=True, reboot=False))
    assert seen <= {None, b"", bytes(SIZE), Path(f"{saved}.content").read_bytes()}
    assert None in seen


def test_ctrl_c_leaves_no_save_file_and_says_what_is_half_restored(host: Host, saved: Path, tmp_path: Path) -> None:
    ctl = [sys.executable, "-m", "tmemd.cli"]
    with subprocess.Popen(
        [*ctl, "restore", "--force", f"--pools={host.pools}", "web", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as restoring:
        assert restoring.stdin
        restoring.stdin.write(saved.read_bytes()[:-1])  # and nothing comes any more
        restoring.stdin.flush()
        wait_until(lambda: is_half_restored(host), "the restore to begin")
        restoring.send_signal(signal.SIGINT)
        assert restoring.wait() == 130
        assert restoring.stderr
        assert b"web is half restored, and nobody can serve it" in restoring.stderr.read()
    assert host.ctl("restore", "web", str(saved)) == 0
    with subprocess.Popen(
        [*ctl, "save", "--whole", f"--pools={host.pools}", "web", "-"], stdout=subprocess.PIPE
    ) as saving:
        assert saving.stdout
        saving.stdout.read(1)  # the rest does not fit into the pipe
        saving.send_signal(signal.SIGINT)
        assert saving.wait() == 130
    assert not list(tmp_path.glob(".*"))


def is_half_restored(host: Host) -> bool:
    with open(host.pool, "rb") as pool:
        identity = poolfile.read_identity(pool.fileno(), host.pool)
    return identity is not None and identity.is_restoring
