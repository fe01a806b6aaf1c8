# SPDX-License-Identifier: BSD-3-Clause
"""Writers that remember what was acknowledged, for servers that die under them."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator

import nbd

from tests.support.content import PAGE, content

RUN = 8


class Ledger:
    """What each page may hold: the version last acknowledged, or one that was under way when the server died.

    Version 0 is zeros, so a trim writes version 0. Every page belongs to one writer.
    """

    def __init__(self, pages: int) -> None:
        self.acknowledged = [0] * pages
        self.under_way: dict[int, int] = {}
        self._versions = itertools.count(1)
        self._progress = threading.Condition()
        self._requests = 0

    def next_version(self) -> int:
        """A version no page has had."""
        return next(self._versions)

    def begin(self, first: int, version: int) -> None:
        """A change of RUN pages is about to be sent."""
        self.under_way.update(dict.fromkeys(range(first, first + RUN), version))

    def end(self, first: int, version: int) -> None:
        """It was acknowledged."""
        for page in range(first, first + RUN):
            self.acknowledged[page] = version
            del self.under_way[page]
        with self._progress:
            self._requests += 1
            self._progress.notify_all()

    def wait_for(self, requests: int, ended: threading.Event) -> None:
        """Return when that many more requests were acknowledged, or the writers have ended."""
        with self._progress:
            goal = self._requests + requests
            while self._requests < goal and not ended.is_set():
                self._progress.wait(0.1)

    def allowed(self, page: int) -> list[int]:
        """The versions that a page may have."""
        return [self.acknowledged[page], *([self.under_way[page]] if page in self.under_way else [])]

    def verify(self, handle: nbd.NBD) -> None:
        """Every page is what was acknowledged or was under way; afterwards it counts as acknowledged."""
        wrong = []
        for page, got in enumerate(pages(handle, len(self.acknowledged))):
            allowed = self.allowed(page)
            found = [version for version in allowed if content(page, version) == got]
            if not found:
                wrong.append((page, allowed, got[:16].hex()))
            else:
                self.acknowledged[page] = found[-1]
        self.under_way.clear()
        assert wrong == []


def pages(handle: nbd.NBD, count: int) -> Iterator[bytes]:
    """All pages of a device, read a megabyte at a time."""
    step = 256
    for first in range(0, count, step):
        data = bytes(handle.pread(min(step, count - first) * PAGE, first * PAGE))
        yield from (data[at : at + PAGE] for at in range(0, len(data), PAGE))


class Writers:
    """Threads that write, each over its own connection and its own pages, until the server is gone or `stop` is set.

    Each *connect* in turn is called for a connection.
    """

    def __init__(self, ledger: Ledger, seed: int, *connects: Callable[[], nbd.NBD], threads: int = 4) -> None:
        self.stop = threading.Event()
        self.failed: list[Exception] = []
        self._ledger = ledger
        runs = list(range(0, len(ledger.acknowledged), RUN))
        self._threads = [
            threading.Thread(target=self._write, args=(connect(), runs[n::threads], random.Random(seed + n)))
            for n, connect in zip(range(threads), itertools.cycle(connects), strict=False)
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, handle: nbd.NBD, runs: list[int], rng: random.Random) -> None:
        try:
            while not self.stop.is_set():
                self._one(handle, rng.choice(runs), rng)
        except (nbd.Error, AssertionError) as error:
            self.failed.append(error)
            self.stop.set()
        finally:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def _one(self, handle: nbd.NBD, first: int, rng: random.Random) -> None:
        trim = rng.random() < 0.1
        version = 0 if trim else self._ledger.next_version()
        data = b"".join(content(page, version) for page in range(first, first + RUN))
        self._ledger.begin(first, version)
        if trim:
            handle.trim(RUN * PAGE, first * PAGE)
        else:
            handle.pwrite(data, first * PAGE)
        self._ledger.end(first, version)
        if rng.random() < 0.2:
            got = bytes(handle.pread(RUN * PAGE, first * PAGE))
            assert got == data, f"pages from {first} are not version {version}"

    def finish(self) -> None:
        """Have them end; AssertionError when a request of theirs failed."""
        self.stop.set()
        self.join()
        assert not self.failed, self.failed

    def join(self) -> None:
        """Wait until all have ended; AssertionError when one of them read something wrong."""
        for thread in self._threads:
            thread.join()
        assert [error for error in self.failed if isinstance(error, AssertionError)] == []
