# SPDX-License-Identifier: BSD-3-Clause
"""Replay block traces on a cache device of the real core (pool and maintenance, no nbdkit), and on models of caches."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tests.support import blocktrace
from tests.support.blocktrace import Op
from tests.support.caches import Cache
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import ServedDevice, open_devices
from tmemd.store import poolfile
from tmemd.store.poolfile import Counters

PAGE: Final = 4096
TMPFS: Final = "/dev/shm"
SLOT: Final = 2112  # bytes that a page of `content` takes
LONGEST: Final = 256  # pages of a request
PAUSE: Final = 0.0001  # seconds


class Request(NamedTuple):
    """A run of pages that is read, or written."""

    first: int
    pages: int
    is_read: bool


@dataclass(frozen=True)
class Trace:
    """Requests, their pages numbered without gaps in the order of the device. Trims are left out."""

    name: str
    requests: list[Request]
    pages: int  # distinct ones


@dataclass(frozen=True)
class Outcome:
    """What a device had."""

    hits: float  # percent of the pages read
    held: int  # pages, the most that were in its pool at any time


def load(path: Path) -> Trace:
    """Read a trace. OSError, lzma.LZMAError or ValueError when it is none."""
    accesses = [access for access in blocktrace.read(path) if access.op is not Op.TRIM]
    used = {page for access in accesses for page in range(access.page, access.page + access.pages)}
    number = {page: n for n, page in enumerate(sorted(used))}
    requests = [Request(number[access.page], access.pages, access.op is Op.READ) for access in accesses]
    return Trace(path.name.partition(".")[0], requests, len(number))


def hits(cache: Cache, requests: Sequence[Request]) -> float:
    """Percent of the pages read that a model had."""
    read = had = 0
    for first, pages, is_read in requests:
        found = sum([cache.use(page, is_read) for page in range(first, first + pages)])
        if is_read:
            read, had = read + pages, had + found
    return 100 * had / read


def content(pages: int) -> Iterator[bytes]:
    """Pages that all compress alike, to a half, each another."""
    rng = random.Random(1)
    for _ in range(pages):
        yield rng.randbytes(PAGE // 2).ljust(PAGE, b"\0")


@contextmanager
def serving(directory: Path, source: Path, capacity: int) -> Iterator[ServedDevice]:
    """A writable device whose pool has room for so many pages of `content`."""
    size = source.stat().st_size
    limit = _core.layout(size).index_offset + size // PAGE * 8 + capacity * SLOT
    config = DeviceConfig("cache", size, None, limit, directory, source=source, write_through=True)
    (device,) = open_devices([config])
    try:
        device.start()
        yield device
    finally:
        device.close()


class _Replay:
    def __init__(self, device: ServedDevice, pool_fd: int) -> None:
        self._device, self._pool_fd = device, pool_fd
        self._read = bytearray(LONGEST * PAGE)
        self._written = b"".join(content(LONGEST))
        self.held = 0

    def counters(self) -> Counters:
        return poolfile.read_counters(self._pool_fd, self._device.pool_path)

    def ask(self, request: Request) -> None:
        offset, n = request.first * PAGE, request.pages * PAGE
        if request.is_read:
            _core.pread(self._device.core, memoryview(self._read)[:n], offset, 0)
        else:
            _core.pwrite(self._device.core, memoryview(self._written)[:n], offset, 0)
        self._let_put()

    def _let_put(self) -> None:
        """Wait for the thread of the core that puts what has missed: guests leave it milliseconds."""
        while self._device.core.staged():
            time.sleep(PAUSE)
        self.held = max(self.held, self.counters().pages_in_tmem)


def replay(requests: Sequence[Request], pages: int, capacity: int) -> Outcome:
    """The requests, one by one, on a device of so many pages with room for about *capacity* of them in its pool."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as name:
        source = Path(name) / "source"
        with source.open("wb") as file:
            file.writelines(content(pages))
        with serving(Path(name), source, capacity) as device, device.pool_path.open("rb") as pool:
            replay = _Replay(device, pool.fileno())
            for request in requests:
                replay.ask(request)
            last = replay.counters()
    return Outcome(100 * last.gets / (last.gets + last.file_reads), replay.held)
