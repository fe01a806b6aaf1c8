# SPDX-License-Identifier: BSD-3-Clause
"""What a backing file must be like to be used. For block devices a sparse file stands in."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.content import PAGE
from tests.support.harness import MIB
from tmemd.device import backing
from tmemd.device.backing import Backing
from tmemd.device.config import DeviceConfig
from tmemd.device.lease import Lease, Times
from tmemd.store import tail as tails
from tmemd.store.poolfile import PoolError
from tmemd.store.tail import Tail

LENGTH, SIZE = 96 * MIB, 64 * MIB  # of the block device, and of the part of it that is used


def find(path: Path, bitmap: Path | None = None) -> Backing:
    """Find the backing of a device of SIZE."""
    return backing.find(DeviceConfig("device", SIZE, path, bitmap=bitmap))


def begin(found: backing.Backing, undo: ExitStack) -> bool:
    """Have no older pool count any more, and make what is not there."""
    config = DeviceConfig("device", SIZE, found.path, reserve=False)
    return backing.begin_epoch(found, uuid.uuid4(), config, claims, undo, restoring=False)


def claims(tail: Tail) -> Lease:
    return Lease(tail, uuid.uuid4(), "host", lambda _: None, times=Times(1.0))


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
        begin(made, undo)
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


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "it failed")


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemd.store.bitmapfile.write_header", fail)
    made = find(tmp_path / "backing")
    with ExitStack() as undo:
        undo.callback(made.close)
        with pytest.raises(PoolError, match="it failed"):
            begin(made, undo)
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


# With a tail


def find_with_tail(path: Path, name: str = "device", size: int = SIZE) -> backing.Backing:
    return backing.find(DeviceConfig(name, size, path, inside=True))


@pytest.fixture
def disk_with_tail(block_device: Path) -> Path:
    """A block device that is in use, with all that a host of before has left."""
    with ExitStack() as undo:
        made = find_with_tail(block_device)
        assert begin(made, undo)
        backing.note_use(made)
        made.close()
        undo.pop_all()
    return block_device


def test_a_block_device_has_its_map_in_its_tail(disk_with_tail: Path) -> None:
    with closing(backing.find(DeviceConfig("device", SIZE, disk_with_tail))) as found, ExitStack() as undo:
        assert found.tail
        assert not begin(found, undo)
        assert found.header
        assert found.header.epoch == 2
        assert all(found.bits())  # nobody knows what it held before
    assert disk_with_tail.stat().st_size == LENGTH


def test_a_file_has_room_for_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "backing"
    with ExitStack() as undo:
        made = find_with_tail(path)
        assert begin(made, undo)
        assert not any(made.bits())
        undo.pop_all()
    made.close()
    assert path.stat().st_size == tails.length_for(SIZE)
    find_with_tail(path).close()
    assert list(tmp_path.iterdir()) == [path]


def test_a_tail_that_belongs_to_another_device_is_refused(disk_with_tail: Path) -> None:
    with pytest.raises(PoolError, match="belongs to device device, says its tail"):
        find_with_tail(disk_with_tail, "other")
    with pytest.raises(PoolError, match=f"of a device of {SIZE} bytes, not of size={MIB}"):
        find_with_tail(disk_with_tail, size=MIB)


@pytest.mark.parametrize("length", [LENGTH - PAGE, SIZE + PAGE, LENGTH + PAGE])
def test_what_has_shrunk_or_grown_is_refused(disk_with_tail: Path, length: int) -> None:
    with disk_with_tail.open("r+b") as file:
        file.write(b"pages")  # at least the signature of a swap area is there
        file.truncate(length)
    with pytest.raises(PoolError, match=r"is not empty and has no tail at its end|room for \d+ bytes beside its tail"):
        find_with_tail(disk_with_tail)


def test_what_has_no_room_for_a_tail_is_refused(block_device: Path) -> None:
    with pytest.raises(PoolError, match=f"less than size={LENGTH}"):
        find_with_tail(block_device, size=LENGTH)


def test_a_tail_that_was_being_made_is_made_anew(block_device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tail, "write_claim", fail)
    with ExitStack() as undo:
        made = find_with_tail(block_device)
        undo.callback(made.close)
        with pytest.raises(PoolError, match="it failed"):
            begin(made, undo)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == block_device)
    with closing(find_with_tail(block_device)) as found, ExitStack() as undo:
        assert found.header is None
        assert begin(found, undo)
    with block_device.open("rb") as file:
        assert not file.read(SIZE).strip(b"\0")


def test_what_could_not_be_opened_after_all_has_no_tail(block_device: Path) -> None:
    with ExitStack() as undo:
        made = find_with_tail(block_device)
        begin(made, undo)
        made.close()
    assert not block_device.read_bytes().strip(b"\0")
