# SPDX-License-Identifier: BSD-3-Clause
"""A file that is whole and durable, or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tmemd.system import locks


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new file, for its owner alone, that takes the place of *path* once the block has ended well.

    Yields its descriptor, open for reading and writing. What a killed process leaves beside it, `.NAME.new`, is used
    again. Raises OSError; BlockingIOError where another process makes the same file.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is there, and is no regular file", str(path))
    new = target.with_name(f".{target.name}.new")
    with ExitStack() as opened, ExitStack() as undo:
        fd = _open_new(new)
        opened.callback(os.close, fd)
        undo.callback(new.unlink)
        os.ftruncate(fd, 0)
        yield fd
        os.fsync(fd)
        new.rename(target)
        undo.pop_all()
        _sync_directory(target.parent)


def _open_new(new: Path) -> int:
    """The file of that name, locked; one that was renamed before it was locked is somebody's save file."""
    while True:
        fd = locks.open_lock_file(new)
        try:
            if os.path.samestat(os.fstat(fd), new.stat(follow_symlinks=False)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
