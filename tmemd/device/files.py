# SPDX-License-Identifier: BSD-3-Clause
"""What backing files and sources have in common: files and block devices whose page cache is bypassed."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tmemd.store.poolfile import PoolError
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


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a PoolError that names the file."""
    try:
        yield
    except OSError as error:
        busy = error.errno == errno.EBUSY
        raise PoolError(f"{path}: {'in use (mounted, or swapped on)' if busy else error.strerror}") from None
