# SPDX-License-Identifier: BSD-3-Clause
"""Locks that go with the last descriptor of the open file they were taken on."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from functools import cache
from pathlib import Path
from typing import Final

_UNLOCKED: Final = struct.pack("h", fcntl.F_UNLCK)


def open_lock_file(path: Path, *, wait: bool = False) -> int:
    """Open the lock file at *path*, made if need be, and take its lock; closing the descriptor is the caller's.

    Nobody but its owner can open it: to lock a file it is enough to be able to read it. Raises BlockingIOError when
    somebody else has the lock, but for *wait*; OSError when there is no such file to be had.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"not a regular file of user {os.geteuid()}", str(path))
        if status.st_mode & 0o077:
            os.fchmod(fd, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(fd)
        raise
    return fd


def try_lock(fd: int, start: int = 0, length: int = 0, *, shared: bool = False) -> bool:
    """Take the lock on these bytes (*length* 0: to the end) without waiting; False when another open has it.

    It is the write lock, or, *shared* with others who do the same, the read lock.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(start, length, fcntl.F_RDLCK if shared else fcntl.F_WRLCK))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_locked(fd: int, start: int = 0, length: int = 0) -> bool:
    """Whether another open of the file holds a lock on any of these bytes."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(start, length))
    return answer[:2] != _UNLOCKED


@cache
def _flock(start: int, length: int, kind: int = fcntl.F_WRLCK) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
