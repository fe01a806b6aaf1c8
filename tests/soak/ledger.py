# SPDX-License-Identifier: BSD-3-Clause
"""What each page of a device may be: servers die under its writers, and now and then the host with them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import nbd

from tests.support.content import PAGE, content

RUN: Final = 8  # pages of a request
LOST: Final = -1  # the version of a page that reads as an error

Entry = tuple[int, int]  # when it was acknowledged, as a number that grows, and the version; 0: zeros


class WrongError(Exception):
    """A page is not what it may be; the message says which, and what it may be."""


class Ledger:
    """The versions of each page since the last FLUSH, and those that were under way when the server died.

    A page belongs to one writer. *file* is whether the device has one, *durable* whether FLUSH means something.
    """

    def __init__(self, runs: Sequence[int], *, file: bool, durable: bool) -> None:
        self.runs = list(runs)
        self.pages_older = 0  # pages that host death took back to a version that is older, but no older than the FLUSH
        self.pages_lost = 0
        self._file, self._durable = file, durable
        self._numbers = itertools.count(1)
        self._entries: dict[int, list[Entry]] = {page: [(0, 0)] for run in runs for page in range(run, run + RUN)}
        self._under_way: dict[int, list[int]] = {}
        self._flushed = 0
        self._progress = threading.Condition()
        self.requests = 0  # that were answered

    @property
    def pages(self) -> int:
        """How many pages it knows of."""
        return len(self._entries)

    def number(self) -> int:
        """A version no page has had; a moment later than all before."""
        return next(self._numbers)

    def begin(self, first: int, version: int) -> None:
        """A change of RUN pages is about to be sent. It is under way until `end`, and if that never comes, `verify`."""
        for page in range(first, first + RUN):
            self._under_way.setdefault(page, []).append(version)

    def end(self, first: int, version: int, *, fua: bool) -> None:
        """It was acknowledged."""
        entry = self.number(), version
        for page in range(first, first + RUN):
            self._entries[page] = [entry] if fua else [*self._kept(page), entry]
            self._under_way.pop(page, None)
        self.progress()

    def flushed(self, begun: int) -> None:
        """A FLUSH was acknowledged that was sent after the moment *begun*."""
        with self._progress:
            self._flushed = max(self._flushed, begun)
        self.progress()

    def progress(self) -> None:
        """One more request was answered."""
        with self._progress:
            self.requests += 1
            self._progress.notify_all()

    def wait_for(self, requests: int, ended: threading.Event) -> None:
        """Return when that many more requests were answered, or the writers have ended."""
        with self._progress:
            goal = self.requests + requests
            while self.requests < goal and not ended.is_set():
                self._progress.wait(0.1)

    def newest(self, page: int) -> int:
        """The version acknowledged last."""
        return self._entries[page][-1][1]

    def _kept(self, page: int) -> list[Entry]:
        """What host death may bring back: the newest of what was flushed, and all since; without FLUSH the newest."""
        entries = self._entries[page]
        if not self._durable:
            return entries[-1:]
        flushed = [number for number, _ in entries if number <= self._flushed]
        return entries[max(len(flushed) - 1, 0) :]

    def _allowed(self, page: int, *, host_died: bool) -> list[int]:
        allowed = [*self._under_way.get(page, ()), self.newest(page)]
        if host_died:
            allowed += [version for _, version in reversed(self._kept(page))]
            allowed += [LOST] if self._file and not self._durable else []
        return list(dict.fromkeys(allowed))

    def forget_all(self) -> None:
        """The device is new: zeros everywhere."""
        self._under_way.clear()
        self._entries = {page: [(self.number(), 0)] for page in self._entries}

    def is_settled(self, run: int) -> bool:
        """Whether all of a run's pages can be read, and no change of them is under way, or was."""
        return all(page not in self._under_way and self.newest(page) != LOST for page in range(run, run + RUN))

    def verify(self, handle: nbd.NBD, runs: Iterable[int], *, host_died: bool = False) -> int:
        """Read these runs, and note what they are; returns how many pages. WrongError if one is what it may not be."""
        seen, wrong = 0, []
        for page, data in read_runs(handle, runs):
            allowed = self._allowed(page, host_died=host_died)
            found = next((version for version in allowed if is_version(page, version, data)), None)
            seen += 1
            if found is None:
                wrong.append(f"page {page} may be {allowed}, and is {'lost' if data is None else data[:16].hex()}")
            else:
                self._note(page, found, host_died=host_died)
        if wrong:
            raise WrongError(f"{len(wrong)} of {seen} pages are wrong: {'; '.join(wrong[:8])}")
        return seen

    def _note(self, page: int, found: int, *, host_died: bool) -> None:
        newest = self.newest(page)
        under_way = self._under_way.pop(page, ())
        if host_died:
            self.pages_lost += found == LOST
            self.pages_older += found not in (LOST, newest, *under_way)
            self._entries[page] = [(self.number(), found)]
        elif found != newest:
            self._entries[page] = [*self._kept(page), (self.number(), found)]


def is_version(page: int, version: int, data: bytes | None) -> bool:
    """Whether *data*, None for an error, is what the page was at that version."""
    return data is None if version == LOST else data == content(page, version)


def read_runs(handle: nbd.NBD, runs: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
    """The pages of these runs, by number; None for one that cannot be read."""
    for run in runs:
        try:
            data = bytes(handle.pread(RUN * PAGE, run * PAGE))
            yield from ((run + n, data[n * PAGE : (n + 1) * PAGE]) for n in range(RUN))
        except nbd.Error as error:
            if error.errno != "EIO":
                raise
            yield from ((page, _read_page(handle, page)) for page in range(run, run + RUN))


def _read_page(handle: nbd.NBD, page: int) -> bytes | None:
    try:
        return bytes(handle.pread(PAGE, page * PAGE))
    except nbd.Error as error:
        if error.errno != "EIO":
            raise
        return None
