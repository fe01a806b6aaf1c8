# SPDX-License-Identifier: BSD-3-Clause
"""How much of a pool is to be free for pages to come. Pure: no clock, no I/O.

A pool that only refuses when it is full keeps the oldest pages in RAM and sends the newest, which are hottest, to the
file (zram's LRU inversion). So cold pages are demoted ahead of need, as kswapd does between two watermarks.
"""

from __future__ import annotations

from typing import Final

from tmemd.store.poolfile import Counters

DEFAULT_PERCENT: Final = 5  # of the target; measured in docs/decisions/0004-cold-pages-make-room.md
MAX_PERCENT: Final = 50
# Of what is to be free: with less room than this, cold pages are demoted. What comes back before the next tick takes of
# the rest, all but the 256th of the target that promotion leaves to writes.
LOW: Final = 3 / 4
# Generations: pages this old were not used for at least one whole one, and make room for others. With 1 uniform use of
# everything writes 0.65 pages to the disk for each page written, with 2 0.53, without any room made 0.49.
MIN_AGE: Final = 2


class FreeWatermark:
    """Watches a pool's counters; says how much room is missing."""

    def __init__(self, percent: int) -> None:
        """*percent*: how much of the target is kept free; 0: nothing."""
        self._percent = percent
        self._before: tuple[Counters, int] | None = None

    def missing(self, now: Counters, back: int, target: int) -> int:
        """Bytes that are to be made free, 0 while nothing comes in.

        *back*: how many pages, ever, came back from the file so soon that they belong in RAM; *target*: in bytes.
        """
        before, back_before = self._before or (now, back)
        self._before = now, back
        wanted, room = target * self._percent // 100, max(target - now.used_bytes, 0)
        comes_in = _comes_in(before, now) or back > back_before
        return wanted - room if comes_in and room < wanted * LOW else 0


def _comes_in(before: Counters, now: Counters) -> bool:
    """Whether pages took, or would have taken, memory that none gave back."""
    put = now.puts - now.puts_zero - (before.puts - before.puts_zero)
    return put > now.invalidates - before.invalidates or now.puts_refused > before.puts_refused
