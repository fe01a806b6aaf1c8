"""How much of a pool is to be free for pages to come. Pure: no clock, no I/O.

A pool that only refuses when it is full keeps the oldest pages in RAM and sends the newest, which are hottest, to the
file (zram's LRU inversion). So cold pages are demoted ahead of need, as kswapd does between two watermarks.
"""

from __future__ import annotations

import math
from typing import Final

from tmemd.poolfile import PAGE, Counters

RECENT: Final = 1.0  # seconds: as much is made room for as came in lately; what came this long ago counts 1/e
LEAST: Final = 1 / 2  # of the most that is kept free, however slowly pages come
LOW: Final = 3 / 4  # of what is wanted: with less room than this, cold pages are demoted


class Headroom:
    """Watches a pool's counters; says how much room is missing."""

    def __init__(self, percent: int) -> None:
        """*percent*: how much of the target is kept free at most; 0: nothing."""
        self._percent = percent
        self._before: tuple[Counters, int] | None = None
        self._recent = 0.0  # bytes that came in lately and were not made up for by others that went

    def missing(self, now: Counters, back: int, room: int, target: int, seconds: float) -> int:
        """Bytes that are to be made free, 0 while nothing comes in.

        *back*: how many pages, ever, came back from the file so soon that they belong in RAM; *room*: bytes of *target*
        that the pool does not use; *seconds* since the last time.
        """
        before, back_before = self._before or (now, back)
        self._before = now, back
        pages = _incoming(before, now) + back - back_before
        self._recent = self._recent * math.exp(-seconds / RECENT) + pages * _page_bytes(now)
        most = target * self._percent // 100
        wanted = min(max(int(self._recent), int(most * LEAST)), most)
        return wanted - room if pages and room < wanted * LOW else 0


def _incoming(before: Counters, now: Counters) -> int:
    """Pages that took, or would have taken, memory that none gave back."""
    refused = now.puts_refused - before.puts_refused
    put = now.puts - now.puts_zero - (before.puts - before.puts_zero)
    return max(put - (now.invalidates - before.invalidates), refused)


def _page_bytes(now: Counters) -> int:
    return now.used_bytes // now.pages_in_tmem if now.pages_in_tmem else PAGE
