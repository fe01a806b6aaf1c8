# SPDX-License-Identifier: BSD-3-Clause
"""The backing file or block device of a device, and its write-intent bitmap: found, checked and opened, or created."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemd.device import files
from tmemd.store import bitmapfile
from tmemd.store.bitmapfile import BitmapHeader
from tmemd.store.poolfile import PAGE, PoolError
from tmemd.system import locks

_PROBE: Final = 8 << 20  # how much of a block device's start and end must be zeros for it to count as empty


@dataclass
class Backing:
    """An open and locked backing file with its bitmap. `header` is None until `create` for one that is new."""

    path: Path
    bitmap_path: Path
    size: int  # of the device, in bytes
    is_block: bool
    fd: int
    bitmap_fd: int = -1
    header: BitmapHeader | None = None
    direct: bool = False

    @property
    def file_bytes(self) -> int:
        """How much of the file may be read and written: whole pages, but for a block device that ends in one."""
        whole = -(-self.size // PAGE) * PAGE
        return min(whole, files.length(self.fd)) if self.is_block else whole

    def close(self) -> None:
        """Close both files, which unlocks them."""
        for fd in (self.fd, self.bitmap_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.bitmap_fd = -1


def find(path: Path, bitmap_path: Path | None, size: int) -> Backing:
    """Check what is there and lock it, changing nothing; a file that does not exist yet is left to `create`.

    Raises PoolError.
    """
    is_block = path.is_block_device()
    if is_block and bitmap_path is None:
        raise PoolError(
            f"{path} is a block device: say with bitmap=FILE where its write-intent bitmap goes, on a file system"
        )
    backing = Backing(path, bitmap_path or Path(f"{path}.map"), size, is_block, -1)
    with ExitStack() as on_error:
        on_error.callback(backing.close)
        for parent in (path.parent, backing.bitmap_path.parent):
            if not parent.is_dir():
                raise PoolError(f"{parent}: no such directory")
        if path.exists():
            _open(backing)
        if backing.bitmap_path.exists():
            _open_bitmap(backing)
        elif backing.fd >= 0 and not _is_empty(backing):
            raise PoolError(
                f"{path} is not empty and has no bitmap ({backing.bitmap_path}): its content is not tmem's; "
                f"{'wipe it' if is_block else 'move it away'} if it is not needed"
            )
        on_error.pop_all()
    return backing


def create(backing: Backing, undo: ExitStack, *, reserve: bool) -> BitmapHeader:
    """Create what `find` did not find: file, its blocks (unless *reserve* is false), and bitmap. *undo* takes it back.

    Returns the new bitmap's header. Raises PoolError.
    """
    try:
        if backing.fd < 0:
            backing.fd = os.open(backing.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            undo.callback(backing.path.unlink)
            _lock(backing.fd, backing.path)
            backing.direct = files.use_direct(backing.fd, backing.path)
        if not backing.is_block:
            undo.callback(os.truncate, backing.path, os.fstat(backing.fd).st_size)
            _extend(backing, reserve=reserve)
        return _create_bitmap(backing, undo)
    except OSError as error:
        raise PoolError(_explain(backing, error, reserve=reserve)) from None


def _explain(backing: Backing, error: OSError, *, reserve: bool) -> str:
    if error.errno == errno.ENOSPC and reserve:
        return (
            f"{backing.path}: no room for its {backing.size} bytes: make room, or let it grow as it fills "
            f"(reserve=no; a full disk then means failed writes)"
        )
    return f"{error.filename or backing.path}: {error.strerror}"


def _extend(backing: Backing, *, reserve: bool) -> None:
    if reserve:
        os.posix_fallocate(backing.fd, 0, backing.file_bytes)
    else:
        os.ftruncate(backing.fd, backing.file_bytes)
    os.fsync(backing.fd)


def _create_bitmap(backing: Backing, undo: ExitStack) -> BitmapHeader:
    """It has its name only when it is whole: what a process that is killed here leaves behind is overwritten."""
    new = Path(f"{backing.bitmap_path}.new")
    new.unlink(missing_ok=True)
    backing.bitmap_fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    undo.callback(new.unlink, missing_ok=True)
    header = BitmapHeader(backing.size, bitmapfile.REGION, uuid.uuid4(), uuid.UUID(int=0), 0)
    # Only the ends of a block device were looked at: what lies between is no zeros to rely on.
    bitmapfile.create_bits(backing.bitmap_fd, header, trusted=not backing.is_block)
    bitmapfile.write_header(backing.bitmap_fd, header)
    new.rename(backing.bitmap_path)
    undo.callback(backing.bitmap_path.unlink)
    for directory in {backing.bitmap_path.parent, backing.path.parent}:
        _sync_directory(directory)
    return header


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(backing: Backing) -> None:
    path = backing.path
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not backing.is_block:
        raise PoolError(f"{path} is neither a file nor a block device")
    with files.named_errors(path):
        # On a block device O_EXCL fails where it is mounted or somebody else's.
        backing.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if backing.is_block else 0))
    if not backing.is_block:  # whose mode is the system's: root's, and its group's, which may read every disk
        _check_private(backing.fd, path)
    _lock(backing.fd, path)
    backing.direct = files.use_direct(backing.fd, backing.path)
    length = files.length(backing.fd)
    if backing.is_block and length < backing.size:
        raise PoolError(f"{path} has {length} bytes, less than size={backing.size}")


def _open_bitmap(backing: Backing) -> None:
    path, bitmap_path = backing.path, backing.bitmap_path
    with files.named_errors(bitmap_path):
        backing.bitmap_fd = os.open(bitmap_path, os.O_RDWR | os.O_CLOEXEC)
    _check_private(backing.bitmap_fd, bitmap_path)
    _lock(backing.bitmap_fd, bitmap_path)
    header = bitmapfile.read_header(backing.bitmap_fd, bitmap_path)
    if header.size != backing.size:
        raise PoolError(f"{bitmap_path}: the bitmap is of a device of {header.size} bytes, not of size={backing.size}")
    length = files.length(backing.fd) if backing.fd >= 0 else 0
    if length < backing.size:
        state = f"has only {length} of its {backing.size} bytes" if length else "is missing or empty"
        raise PoolError(
            f"{path} {state}, but its bitmap {bitmap_path} says it is in use: restore it, or remove the bitmap"
        )
    backing.header = header


def _is_empty(backing: Backing) -> bool:
    """Whether nothing was ever written: a file without data, or a block device with zeros where signatures are.

    Those are at its start, at its end, and at the end of what we use of it: there the file is read after the host died
    even if the page was never written.
    """
    length = files.length(backing.fd)
    if not backing.is_block:
        try:
            os.lseek(backing.fd, 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
        return length == 0
    starts = 0, max(backing.size - _PROBE, 0), length - min(length, _PROBE)
    with open(backing.path, "rb", buffering=0) as device:
        return all(not os.pread(device.fileno(), _PROBE, start).strip(b"\0") for start in starts)


def _check_private(fd: int, path: Path) -> None:
    """What a guest swaps out is for nobody else to read; who may write to the bitmap could have old pages returned."""
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()):
        raise PoolError(f"{path} belongs to user {status.st_uid}, who could read the guest's memory: chown it")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise PoolError(f"{path} is open to other users (mode {mode:04o}): chmod 600 {path}")


def _lock(fd: int, path: Path) -> None:
    if not locks.try_lock(fd):
        raise PoolError(f"{path} is in use by another process")
