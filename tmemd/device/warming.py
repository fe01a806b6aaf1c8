# SPDX-License-Identifier: BSD-3-Clause
"""A device that begins with nothing in RAM fetches the pages of a list ahead, beside its requests.

Each page comes from the file as any that is fetched ahead does: into memory that nobody needs, and older than all that
the guest uses, so that it leaves first.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tmemd.binding import _core
from tmemd.store import hotlist, poolfile
from tmemd.store.poolfile import PoolError

THREADS: Final = 4
RUN: Final = 64  # pages that are fetched in one read at most
# Seconds. tmemd gives a pool that is new more room as it uses what it has.
_RETRY: Final = 0.5
_PATIENCE: Final = 10.0


class Warming:
    """Threads that fetch, from `start` until they are done or `stop` was called."""

    def __init__(self, core: _core.Device, pool_fd: int, pool_path: Path, list_path: Path) -> None:
        self._core, self._pool_fd, self._pool_path, self._list_path = core, pool_fd, pool_path, list_path
        self._log: Callable[[str], None] = lambda _: None
        self._stop = threading.Event()
        self._next = threading.Lock()
        self._runs: Iterator[tuple[int, int]] = iter(())
        self._threads: list[threading.Thread] = []

    def start(self, log: Callable[[str], None]) -> None:
        """Begin, where there is nothing in RAM. *log* is told how it went."""
        self._log = log
        if poolfile.read_counters(self._pool_fd, self._pool_path).pages_in_tmem:
            return
        self._threads = [threading.Thread(target=self._run, name="tmem-warm", daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """End it, once what is being fetched has come."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            wanted = hotlist.read(self._list_path)
            identity = poolfile.read_identity(self._pool_fd, self._pool_path)
            assert identity
            wanted.check(identity, self._list_path)
        except PoolError as error:
            self._log(f"it begins with nothing in RAM: {error}")
            return
        self._runs = _in_runs(wanted.ranges)
        began, before = time.monotonic(), self._fetched()
        helpers = [threading.Thread(target=self._fetch, daemon=True) for _ in range(THREADS - 1)]
        for helper in helpers:
            helper.start()
        self._fetch()
        for helper in helpers:
            helper.join()
        took = time.monotonic() - began
        self._log(f"{self._fetched() - before} of the {wanted.pages} pages listed were fetched ahead in {took:.1f} s")

    def _fetched(self) -> int:
        return poolfile.read_counters(self._pool_fd, self._pool_path).prefetches

    def _fetch(self) -> None:
        while (run := self._take()) and self._has_come(*run):
            pass

    def _take(self) -> tuple[int, int] | None:
        with self._next:
            return next(self._runs, None)

    def _has_come(self, first: int, n: int) -> bool:
        """Fetch a run; false: it is over."""
        end = time.monotonic() + _PATIENCE
        while not self._stop.is_set():
            try:
                self._core.warm(first, n)
                return True
            except OSError as error:
                if error.errno != errno.ENOSPC or time.monotonic() > end:
                    return False
            self._stop.wait(_RETRY)
        return False


def _in_runs(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, count in ranges:
        for start in range(first, first + count, RUN):
            yield start, min(RUN, first + count - start)
