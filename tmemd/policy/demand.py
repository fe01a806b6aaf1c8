"""What a policy knows of one pool."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd.governor.sample import PoolSample
from tmemd.store.poolfile import PAGE, Counters

# Before a pool has stored anything to measure it by: what LZ4 makes of a page of a live process.
_FIRST_PAGE_BYTES: Final = PAGE // 3
_ENOUGH: Final = 1000  # pages


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One pool at one tick. Sizes in bytes of RAM; pages are counts since the tick before."""

    name: str
    weight: int  # its share is in proportion to this
    minimum: int  # a target is never below
    cap: int  # nor above
    used: int
    target: int  # what holds now
    overhead: int  # of `used`, what no demotion gives back: the index above all
    page_bytes: int  # of RAM that one page takes, on average
    heat: tuple[int, ...]  # by age in generations: what the pages last used then take, or would if they were in tmem
    put: int  # pages, of more than zeros, since the pool was made
    read: int  # pages, wherever they were, since the pool was made
    puts: int
    refused: int
    file_reads: int


def demand(before: PoolSample | None, now: PoolSample) -> Demand:
    """What a policy is told of a pool, from its last two samples (None: there is only one)."""
    counters, ages = now.counters, now.ages
    earlier = before.counters if before else counters
    overhead = counters.used_bytes - sum(ages.stored_bytes) if ages.surveys else counters.index_bytes
    overhead = min(max(overhead, counters.index_bytes), counters.used_bytes)
    page = _page_bytes(counters)
    cap = min(counters.limit_bytes, now.cap_bytes if now.cap_bytes is not None else counters.limit_bytes)
    # What nobody could demote stays; and no device works below its own minimum.
    stuck = 0 if now.has_file and now.served else counters.used_bytes
    minimum = max(now.minimum_bytes, counters.minimum_bytes, stuck)
    return Demand(
        name=now.name,
        weight=now.weight,
        minimum=minimum,
        cap=max(cap, minimum),
        used=counters.used_bytes,
        target=now.target_bytes,
        overhead=overhead,
        page_bytes=page,
        heat=tuple([stored + filed * page for stored, filed in zip(ages.stored_bytes, ages.filed_pages, strict=True)]),
        put=counters.puts - counters.puts_zero,
        read=counters.gets + counters.file_reads,
        puts=counters.puts - earlier.puts,
        refused=counters.puts_refused - earlier.puts_refused,
        file_reads=counters.file_reads - earlier.file_reads,
    )


def _page_bytes(counters: Counters) -> int:
    # Not from the survey, which a guest that starts again after it freed everything is ahead of.
    if counters.pages_in_tmem < _ENOUGH:
        return _FIRST_PAGE_BYTES
    return max(1, (counters.used_bytes - counters.index_bytes) // counters.pages_in_tmem)
