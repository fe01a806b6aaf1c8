# SPDX-License-Identifier: BSD-3-Clause
"""What backing files and sources have in common: files and block devices whose page cache is bypassed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tmemd.store.poolfile import PoolError
from tmemd.system import locks
from tmemd.system.tmpfs import is_tmpfs

_BLKGETSIZE64: Final = 0x80081272


def length(fd: int) -> int:
    """Bytes that an open file or block device has."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("Q", answer)[0])


def use_direct(fd: int, path: Path) -> bool:
    """Bypass the page cache, and say whether it is: tmpfs accepts O_DIRECT, but is the page cache itself."""
    if not path.is_block_device() and is_tmpfs(path):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


class LocalStore:
    """An open file or block device as the tail's store; where *fd* is O_DIRECT nothing comes from the page cache."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return length(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Whole blocks, as O_DIRECT has it."""
        with mmap.mmap(-1, length) as aligned:
            if os.preadv(self._fd, [aligned], offset) != length:
                raise OSError(errno.EIO, "it is shorter than it was")
            return aligned[:]

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        """Likewise."""
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            if os.pwrite(self._fd, aligned, offset) != len(data):
                raise OSError(errno.EIO, "a part of it was not written")
        if durable:
            self.flush()

    def flush(self) -> None:
        """Make all that was written durable."""
        os.fdatasync(self._fd)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a PoolError that names the file."""
    try:
        yield
    except OSError as error:
        busy = error.errno == errno.EBUSY
        raise PoolError(f"{path}: {'in use (mounted, or swapped on)' if busy else error.strerror}") from None


def check_private(fd: int, path: Path) -> None:
    """Raise PoolError for a file that other users can open.

    What a guest swaps out is for nobody else to read; who may write to the bitmap could have old pages returned.
    """
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()):
        raise PoolError(f"{path} belongs to user {status.st_uid}, who could read the guest's memory: chown it")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise PoolError(f"{path} is open to other users (mode {mode:04o}): chmod 600 {path}")


def lock(fd: int, path: Path) -> None:
    """Lock it, or raise PoolError: one process at a time has it."""
    if not locks.try_lock(fd):
        raise PoolError(f"{path} is in use by another process")


def sync_directory(path: Path) -> None:
    """Make durable what its entries are."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
