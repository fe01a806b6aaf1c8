# SPDX-License-Identifier: BSD-3-Clause
"""The source of a cache device: the file or block device that is the device, and of which tmem holds copies.

What a pool holds is only of use while the source is what it was when the pages were read. A file tells by its times; a
block device has none, so that nothing is kept of it when the process ends.
"""

from __future__ import annotations

import os
import stat
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from tmemd.binding import _core
from tmemd.device import files, remote
from tmemd.device.config import DeviceConfig, Uri
from tmemd.store.poolfile import PoolError
from tmemd.system import locks

# Seconds. Times of files go on in ticks of 10 ms at most, and what is written within one leaves them as they are: of
# what was changed less than this ago nothing is taken to be known (git's index calls such times racy).
_SETTLED: Final = 1.0
_TICK: Final = 0.01
_READERS: Final = 1 << 62  # the byte that readers lock, beyond any file's end
_NAMESPACE: Final = UUID("d8f0a3de-0f4c-4b0e-9d57-6b1f43a4c0f2")


@dataclass
class Source:
    """An open and locked source."""

    path: Path | Uri
    size: int  # in bytes
    write: bool
    fd: int = -1
    direct: bool = False
    opened: os.stat_result | None = None  # of a file, whose times tell whether somebody has changed it
    remote: _core.Remote | None = None  # instead of fd
    noted: UUID | None = None  # what the pool says it holds

    @property
    def file_bytes(self) -> int:
        """How much of it may be read and written."""
        return self.size

    def close(self) -> None:
        """Close it, which unlocks it."""
        if self.fd >= 0:
            os.close(self.fd)
        self.remote = None

    def is_as_opened(self) -> bool:
        """Whether nobody has changed it since, as far as can be told."""
        return self.opened is None or _content(os.fstat(self.fd)) == _content(self.opened)

    def content_id(self) -> UUID | None:
        """A name for what it holds: another once somebody has written to it. None: it cannot be told.

        What is only read is never taken to have changed: nothing more is read from it then.
        """
        if self.opened is None:
            return None
        status = os.fstat(self.fd) if self.write else self.opened
        if time.time() - status.st_ctime < _SETTLED:
            return None
        return uuid.uuid5(_NAMESPACE, ":".join(map(str, _content(status))))


def _content(status: os.stat_result) -> tuple[int, ...]:
    """Which file it is, and when content and inode were last changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def size_of(path: Path | Uri) -> int:
    """The size in bytes of a source. Raises PoolError where there is none, or it cannot be one."""
    if isinstance(path, Uri):
        return remote.size_of(path)
    with files.named_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise PoolError(f"{path} is neither a file nor a block device")
        return files.length(fd)
    finally:
        os.close(fd)


def open_source(config: DeviceConfig) -> Source:
    """Open the source that *config* names, and lock it: with other readers, or alone to write. Raises PoolError.

    What an NBD server exports is locked by nobody, and neither there nor of a block device it shows who changes it.
    """
    path, write = config.source, config.write_through
    assert path is not None
    if isinstance(path, Uri):
        server = remote.connect(config, path, write=write)
        return Source(path, server.status.size, write, remote=server)
    return _open_file(path, write=write)


def _open_file(path: Path, *, write: bool) -> Source:
    size_of(path)  # it can be a source at all
    is_block = path.is_block_device()
    # On a block device O_EXCL fails where it is mounted or somebody else's.
    flags = (os.O_RDWR | (os.O_EXCL if is_block else 0)) if write else os.O_RDONLY
    with files.named_errors(path), ExitStack() as on_error:
        fd = os.open(path, flags | os.O_CLOEXEC)
        on_error.callback(os.close, fd)
        # QEMU locks bytes of its own near the start: who reads beside us may, who writes may not.
        if not (locks.try_lock(fd) if write else locks.try_lock(fd, _READERS, 1, shared=True)):
            raise PoolError(f"{path} is in use by another process")
        opened = os.fstat(fd) if write or is_block else _settled_status(fd, path)
        # O_DIRECT takes whole sectors, which may have as many bytes as a page.
        direct = opened.st_size % _core.PAGE == 0 and files.use_direct(fd, path)
        on_error.pop_all()
    return Source(path, files.length(fd), write, fd, direct, None if is_block else opened)


def _settled_status(fd: int, path: Path) -> os.stat_result:
    """Where it was changed right now, wait for another time: the page path looks whether its times stay the same."""
    end = time.monotonic() + _SETTLED
    while 0 <= (age := time.time() - (status := os.fstat(fd)).st_ctime) < 2 * _TICK:
        if time.monotonic() > end:
            raise PoolError(f"{path}: somebody is writing to it")
        time.sleep(2 * _TICK - age)
    return status
