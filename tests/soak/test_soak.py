# SPDX-License-Identifier: BSD-3-Clause
"""The soak in short, and that it would see what it looks for."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from tests.soak.ledger import LOST, RUN, Ledger, WrongError
from tests.soak.soak import HOST_DIES_EVERY, KINDS, Findings, run
from tests.support import leftovers
from tests.support.content import PAGE, content
from tests.support.harness import ROOT, wait_until

Change = Callable[[int, int], None]


class Disk:
    """Stands in for a connection: pages by version, LOST for an error."""

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}

    def pread(self, count: int, offset: int) -> bytes:
        first, n = offset // PAGE, count // PAGE
        versions = [self.versions.get(page, 0) for page in range(first, first + n)]
        if LOST in versions:
            error = nbd.Error("lost", errno.EIO)
            raise error
        return b"".join(content(first + at, version) for at, version in enumerate(versions))


class Bench:
    """One run of pages with versions 1, 2 and 3 acknowledged, version 1 flushed, and version 4 under way."""

    def __init__(self, *, durable: bool) -> None:
        self.disk, self.ledger = Disk(), Ledger([0], file=True, durable=durable)
        self.versions = []
        for _ in range(3):
            self.versions.append(self.ledger.number())
            self.ledger.begin(0, self.versions[-1])
            self.ledger.end(0, self.versions[-1], fua=False)
            if len(self.versions) == 1:
                self.ledger.flushed(self.ledger.number())
        self.versions.append(self.ledger.number())
        self.ledger.begin(0, self.versions[-1])

    def found(self, nth: int, *, host_died: bool) -> None:
        """The last page is what it was after the nth write; 0: zeros, -1: an error."""
        self.disk.versions = dict.fromkeys(range(RUN - 1), self.versions[-2])
        self.disk.versions[RUN - 1] = self.versions[nth - 1] if nth > 0 else nth
        self.ledger.verify(self.disk, [0], host_died=host_died)


@pytest.mark.parametrize(
    ("durable", "host_died", "allowed"),
    [(False, False, {3, 4}), (True, False, {3, 4}), (False, True, {3, 4, LOST}), (True, True, {1, 2, 3, 4})],
)
def test_what_is_lost_or_stale_is_found(durable: bool, host_died: bool, allowed: set[int]) -> None:
    for nth in range(LOST, 5):
        bench = Bench(durable=durable)
        if nth in allowed:
            bench.found(nth, host_died=host_died)
            bench.ledger._under_way.clear()
            bench.found(nth, host_died=False)
        else:
            with pytest.raises(WrongError, match=f"page {RUN - 1} may be"):
                bench.found(nth, host_died=host_died)


@pytest.mark.slow
def test_a_few_kills_lose_nothing_and_leave_nothing() -> None:
    seen: list[int] = []

    def note(now: Findings) -> None:
        seen.append(now.kills)

    found = run(list(KINDS), kills=HOST_DIES_EVERY + 2, seconds=600.0, seed=1, progress=note)
    assert seen == list(range(1, HOST_DIES_EVERY + 3))
    assert found.host_deaths == 1
    assert found.pages_lost_with_the_host > 0
    assert set(found.memory_of_fresh) == set(KINDS)


def test_ctrl_c_ends_it_cleanly() -> None:
    command = leftovers.dying_with_us([sys.executable, "-m", "tests.soak", "--kinds", "ram", "--kills", "100000"])
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:

        def directories() -> list[Path]:
            return [path for place in leftovers.PLACES for path in place.glob(f"{leftovers.PREFIX}{process.pid}-*")]

        def served() -> bool:
            return any([*path.glob("pools/ram.pool")] for path in directories())

        wait_until(lambda: served() or process.poll() is not None, "a device")
        process.send_signal(signal.SIGINT)
        assert process.stderr
        assert process.stderr.read().splitlines()[-1] == "soak: interrupted"
    assert process.returncode == 130
    assert directories() == []
