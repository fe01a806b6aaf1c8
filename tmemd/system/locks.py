"""Open file description locks: they belong to one open of a file and go when its last descriptor is closed."""

from __future__ import annotations

import fcntl
import os
import struct
from functools import cache
from typing import Final

_UNLOCKED: Final = struct.pack("h", fcntl.F_UNLCK)


def try_lock(fd: int, start: int = 0, length: int = 0) -> bool:
    """Take the write lock on these bytes (*length* 0: to the end) without waiting; False when another open has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(start, length))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_locked(fd: int, start: int = 0, length: int = 0) -> bool:
    """Whether another open of the file holds a lock on any of these bytes."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(start, length))
    return answer[:2] != _UNLOCKED


@cache
def _flock(start: int, length: int) -> bytes:
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
