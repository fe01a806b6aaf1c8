"""How much of a pool is to be free for pages to come. Pure: no clock, no I/O.

A pool that only refuses when it is full keeps the oldest pages in RAM and sends the newest, which are hottest, to the
file (zram's LRU inversion). So cold pages are demoted ahead of need, as kswapd does between two watermarks.
"""

from __future__ import annotations

from typing import Final

from tmemd.poolfile import PAGE, Counters

AHEAD: Final = 1.0  # seconds of pages to come that are made room for
LEAST: Final = 1 / 8  # of the most that is kept free, however slowly pages come
FADING: Final = 2.0  # seconds in which a rate that is no longer seen falls to 1/e


class Headroom:
    """Watches a pool's counters; says how much is to be demoted."""

    def __init__(self, percent: int) -> None:
        """*percent*: how much of the target is kept free at most; 0: nothing."""
        self._percent = percent
        self._before: Counters | None = None
        self._rate = 0.0  # bytes a second that come in and are not made up for by others that go

    def missing(self, now: Counters, free: int, target: int, seconds: float) -> int:
        """Bytes to demote, 0 while nothing comes in.

        *free*: bytes of *target* that can be filled now; *seconds* since the last time.
        """
        before, self._before = self._before or now, now
        pages = _incoming(before, now)
        self._follow(pages * _page_bytes(now), seconds)
        most = target * self._percent // 100
        wanted = min(max(int(self._rate * AHEAD), int(most * LEAST)), most)
        return wanted - free if pages and free < wanted / 2 else 0

    def _follow(self, nbytes: int, seconds: float) -> None:
        fading = max(0.0, 1 - seconds / FADING)
        self._rate = max(nbytes / seconds if seconds else 0.0, self._rate * fading)


def _incoming(before: Counters, now: Counters) -> int:
    """Pages that took, or would have taken, memory that none gave back."""
    refused = now.puts_refused - before.puts_refused
    put = now.puts - now.puts_zero - (before.puts - before.puts_zero)
    return max(put - (now.invalidates - before.invalidates), refused)


def _page_bytes(now: Counters) -> int:
    return now.used_bytes // now.pages_in_tmem if now.pages_in_tmem else PAGE
