# SPDX-License-Identifier: BSD-3-Clause
"""Writers that go on until the server they write to is killed, and note in a ledger what was acknowledged."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Final

import nbd

from tests.soak.ledger import RUN, Ledger, WrongError, is_version
from tests.support.content import PAGE, content
from tests.support.harness import connect

PAUSE: Final = 0.002  # seconds between two requests of a writer at most: what is to be busy is the server's restart
THREADS: Final = 3


class Writers:
    """Threads that write, trim, zero, flush and read, each over a connection and in runs of pages of its own.

    *may_refuse*: a write may fail for want of memory. Any other request that fails while the server lives is an error.
    """

    def __init__(self, socket: Path, ledger: Ledger, rng: random.Random, *, may_refuse: bool) -> None:
        self.ended = threading.Event()
        self.errors: list[Exception] = []
        self._ledger, self._may_refuse = ledger, may_refuse
        self._dying = False
        self._threads = []
        for n in range(THREADS):
            arguments = connect(socket), ledger.runs[n::THREADS], random.Random(rng.random())
            self._threads.append(threading.Thread(target=self._work, args=arguments))
        for thread in self._threads:
            thread.start()

    def expect_death(self) -> None:
        """From now on the server may be gone."""
        self._dying = True

    def join(self) -> None:
        """Stop, and wait for the end of all threads. Raises what went wrong in one of them."""
        self.ended.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _work(self, handle: nbd.NBD, runs: list[int], rng: random.Random) -> None:
        try:
            while not self.ended.wait(rng.random() * PAUSE):
                self._one(handle, rng.choice(runs), rng)
        except nbd.Error as error:
            if not self._dying:
                self.errors.append(error)
        except WrongError as error:
            self.errors.append(error)
        finally:
            self.ended.set()
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def _one(self, handle: nbd.NBD, first: int, rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.05:
            begun = self._ledger.number()
            handle.flush()
            self._ledger.flushed(begun)
        elif kind < 0.2:
            self._read(handle, first)
        else:
            self._change(handle, first, rng, erase=kind < 0.32)

    def _change(self, handle: nbd.NBD, first: int, rng: random.Random, *, erase: bool) -> None:
        version = 0 if erase else self._ledger.number()
        fua = rng.random() < 0.1
        flags = nbd.CMD_FLAG_FUA if fua else 0
        self._ledger.begin(first, version)
        try:
            if not erase:
                data = b"".join(content(page, version) for page in range(first, first + RUN))
                handle.pwrite(data, first * PAGE, flags=flags)
            elif rng.random() < 0.5:
                handle.trim(RUN * PAGE, first * PAGE, flags=flags)
            else:
                handle.zero(RUN * PAGE, first * PAGE, flags=flags)
        except nbd.Error as error:
            if not self._may_refuse or error.errno != "EIO":
                raise
            self._ledger.progress()
        else:
            self._ledger.end(first, version, fua=fua)

    def _read(self, handle: nbd.NBD, first: int) -> None:
        """Pages that are settled must be their newest."""
        if not self._ledger.is_settled(first):
            return
        data = bytes(handle.pread(RUN * PAGE, first * PAGE))
        for n in range(RUN):
            newest = self._ledger.newest(first + n)
            if not is_version(first + n, newest, data[n * PAGE : (n + 1) * PAGE]):
                raise WrongError(f"page {first + n} is not version {newest}, which it was to be")
        self._ledger.progress()
