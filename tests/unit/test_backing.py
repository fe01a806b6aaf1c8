# SPDX-License-Identifier: BSD-3-Clause
"""What a backing file must be like to be used. For block devices a sparse file stands in."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.content import PAGE
from tests.support.harness import MIB
from tmemd.device import backing
from tmemd.device.backing import Backing
from tmemd.device.config import DeviceConfig
from tmemd.store.poolfile import PoolError

LENGTH, SIZE = 96 * MIB, 64 * MIB  # of the block device, and of the part of it that is used


def find(path: Path, bitmap: Path | None = None) -> Backing:
    """Find the backing of a device of SIZE."""
    return backing.find(DeviceConfig("device", SIZE, path, bitmap=bitmap))


@pytest.fixture
def block_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like a block device full of zeros."""
    path = tmp_path / "block"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == path)
    return path


def test_a_block_device_of_zeros_is_empty(block_device: Path, tmp_path: Path) -> None:
    block_device.chmod(0o660)  # as the system makes them, for the group disk
    find(block_device, tmp_path / "map").close()


@pytest.mark.parametrize("offset", [0, 256 * PAGE, 1024 * PAGE, SIZE - 386 * PAGE, SIZE - 1, LENGTH - PAGE])
def test_one_that_may_hold_a_signature_is_not(block_device: Path, tmp_path: Path, offset: int) -> None:
    with block_device.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    with pytest.raises(PoolError, match="not empty"):
        find(block_device, tmp_path / "map")


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A backing file with its map, as we make them."""
    path = tmp_path / "backing"
    with ExitStack() as undo:
        made = find(path)
        backing.create(made, undo, reserve=False)
        made.close()
        undo.pop_all()
    return path


@pytest.mark.parametrize("kind", ["directory", "pipe", "character device"])
def test_what_holds_no_pages_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "backing"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(PoolError, match="is neither a file nor a block device"):
        find(path, tmp_path / "map")


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "it failed")

    monkeypatch.setattr("tmemd.store.bitmapfile.write_header", fail)
    made = find(tmp_path / "backing")
    with ExitStack() as undo:
        undo.callback(made.close)
        with pytest.raises(PoolError, match="it failed"):
            backing.create(made, undo, reserve=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", ".map"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o610])
def test_what_other_users_can_open_is_refused(used: Path, suffix: str, mode: int) -> None:
    path = Path(f"{used}{suffix}")
    find(used).close()
    path.chmod(mode)
    with pytest.raises(PoolError, match=rf"open to other users \(mode 0{mode:o}\): chmod 600 {path}$"):
        find(used)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize("suffix", ["", ".map"])
def test_what_belongs_to_another_user_is_refused(used: Path, suffix: str) -> None:
    os.chown(f"{used}{suffix}", 65534, 65534)
    with pytest.raises(PoolError, match="belongs to user 65534, who could read the guest's memory: chown it"):
        find(used)


def test_an_empty_file_that_others_can_read_is_refused_before_it_holds_anything(tmp_path: Path) -> None:
    path = tmp_path / "made before"
    path.touch(0o644)
    with pytest.raises(PoolError, match="chmod 600"):
        find(path)
    path.chmod(0o600)
    find(path).close()
