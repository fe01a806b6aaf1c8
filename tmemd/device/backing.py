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

from tmemd.binding import _core
from tmemd.device import files, remote
from tmemd.device.config import DeviceConfig, Uri
from tmemd.store import bitmapfile
from tmemd.store.bitmapfile import BitmapHeader
from tmemd.store.poolfile import PAGE, PoolError
from tmemd.system import locks

_PROBE: Final = 8 << 20  # how much of a block device's start and end must be zeros for it to count as empty


@dataclass
class Backing:
    """An open and locked backing file with its bitmap. `header` is None until `create` for one that is new."""

    path: Path | Uri
    bitmap_path: Path
    size: int  # of the device, in bytes
    is_disk: bool  # a block device or an NBD server's export: as long as it is, whatever it held before
    fd: int = -1
    bitmap_fd: int = -1
    header: BitmapHeader | None = None
    direct: bool = False
    remote: _core.Remote | None = None  # instead of fd

    @property
    def length(self) -> int:
        """Bytes that are there."""
        return self.remote.status.size if self.remote else files.length(self.fd)

    @property
    def file_bytes(self) -> int:
        """How much of the file may be read and written: whole pages, but for a block device that ends in one."""
        whole = -(-self.size // PAGE) * PAGE
        return min(whole, self.length) if self.is_disk else whole

    def close(self) -> None:
        """Let go of both, which unlocks them."""
        for fd in (self.fd, self.bitmap_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.bitmap_fd = -1
        self.remote = None


def find(config: DeviceConfig) -> Backing:
    """Check what is there and lock it, changing nothing; a file that does not exist yet is left to `create`.

    *config* has a backing. Raises PoolError.
    """
    path = config.backing
    assert path is not None
    is_disk = isinstance(path, Uri) or path.is_block_device()
    if is_disk and config.bitmap is None:
        raise PoolError(
            f"{path} is no plain file: say with bitmap=FILE where its write-intent bitmap goes, on a file system"
        )
    backing = Backing(path, config.bitmap or Path(f"{path}.map"), config.size, is_disk)
    with ExitStack() as on_error:
        on_error.callback(backing.close)
        _check_directories(backing)
        if isinstance(path, Uri):
            backing.remote = remote.connect(config, path, write=True)
            _check_length(backing)
        elif path.exists():
            _open(backing, path)
        if backing.bitmap_path.exists():
            _open_bitmap(backing)
        elif (backing.fd >= 0 or backing.remote) and not _is_empty(backing):
            raise PoolError(
                f"{path} is not empty and has no bitmap ({backing.bitmap_path}): its content is not tmem's; "
                f"{'wipe it' if is_disk else 'move it away'} if it is not needed"
            )
        on_error.pop_all()
    return backing


def _check_directories(backing: Backing) -> None:
    for path in (backing.path, backing.bitmap_path):
        if isinstance(path, Path) and not path.parent.is_dir():
            raise PoolError(f"{path.parent}: no such directory")


def _check_length(backing: Backing) -> None:
    if backing.length < backing.size:
        raise PoolError(f"{backing.path} has {backing.length} bytes, less than size={backing.size}")


def create(backing: Backing, undo: ExitStack, *, reserve: bool) -> BitmapHeader:
    """Create what `find` did not find: file, its blocks (unless *reserve* is false), and bitmap. *undo* takes it back.

    Returns the new bitmap's header. Raises PoolError.
    """
    try:
        if not backing.is_disk:
            _create_file(backing, Path(backing.path), undo)
            _extend(backing, reserve=reserve)
        return _create_bitmap(backing, undo)
    except OSError as error:
        raise PoolError(_explain(backing, error, reserve=reserve)) from None


def _create_file(backing: Backing, path: Path, undo: ExitStack) -> None:
    if backing.fd < 0:
        backing.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(path.unlink)
        _lock(backing.fd, path)
        backing.direct = files.use_direct(backing.fd, path)
    undo.callback(os.truncate, path, os.fstat(backing.fd).st_size)


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
    # Only the ends of a disk were looked at: what lies between is no zeros to rely on.
    bitmapfile.create_bits(backing.bitmap_fd, header, trusted=not backing.is_disk)
    bitmapfile.write_header(backing.bitmap_fd, header)
    new.rename(backing.bitmap_path)
    undo.callback(backing.bitmap_path.unlink)
    for directory in {path.parent for path in (backing.bitmap_path, backing.path) if isinstance(path, Path)}:
        _sync_directory(directory)
    return header


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(backing: Backing, path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not backing.is_disk:
        raise PoolError(f"{path} is neither a file nor a block device")
    with files.named_errors(path):
        # On a block device O_EXCL fails where it is mounted or somebody else's.
        backing.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if backing.is_disk else 0))
    if not backing.is_disk:  # whose mode is the system's: root's, and its group's, which may read every disk
        _check_private(backing.fd, path)
    _lock(backing.fd, path)
    backing.direct = files.use_direct(backing.fd, path)
    if backing.is_disk:
        _check_length(backing)


def _open_bitmap(backing: Backing) -> None:
    path, bitmap_path = backing.path, backing.bitmap_path
    with files.named_errors(bitmap_path):
        backing.bitmap_fd = os.open(bitmap_path, os.O_RDWR | os.O_CLOEXEC)
    _check_private(backing.bitmap_fd, bitmap_path)
    _lock(backing.bitmap_fd, bitmap_path)
    header = bitmapfile.read_header(backing.bitmap_fd, bitmap_path)
    if header.size != backing.size:
        raise PoolError(f"{bitmap_path}: the bitmap is of a device of {header.size} bytes, not of size={backing.size}")
    length = backing.length if backing.fd >= 0 or backing.remote else 0
    if length < backing.size:
        state = f"has only {length} of its {backing.size} bytes" if length else "is missing or empty"
        raise PoolError(
            f"{path} {state}, but its bitmap {bitmap_path} says it is in use: restore it, or remove the bitmap"
        )
    backing.header = header


def _is_empty(backing: Backing) -> bool:
    """Whether nothing was ever written: a file without data, or a disk with zeros where signatures are.

    Those are at its start, at its end, and at the end of what we use of it: there the file is read after the host died
    even if the page was never written.
    """
    length = backing.length
    if not backing.is_disk:
        try:
            os.lseek(backing.fd, 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
        return length == 0
    starts = 0, max(backing.size - _PROBE, 0), length - min(length, _PROBE)
    return not any(_read(backing, start, min(_PROBE, length - start)).strip(b"\0") for start in starts)


def _read(backing: Backing, offset: int, length: int) -> bytes:
    """Of a disk. Raises PoolError."""
    try:
        if backing.remote:
            return backing.remote.read(offset, length)
        with open(backing.path, "rb", buffering=0) as device:
            return os.pread(device.fileno(), length, offset)
    except OSError as error:
        raise PoolError(f"{backing.path}: {error.strerror}") from None


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
