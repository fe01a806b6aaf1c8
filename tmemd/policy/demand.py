# SPDX-License-Identifier: BSD-3-Clause
"""What a policy knows of one pool."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd.store.poolfile import PAGE, Counters
from tmemd.store.sample import PoolSample

# Before a pool has stored anything to measure it by: what LZ4 makes of a page of a live process.
FIRST_PAGE_BYTES: Final = PAGE // 3
ENOUGH_PAGES: Final = 1000  # in tmem, to measure what one takes
ENOUGH_READS: Final = 100  # of the file, to know how far it is
# One tick makes the file seem so many times as far as before at most: a read that hung for a minute is no distance.
_JUMP: Final = 16
# Before one was read: a page of 4 KiB on an NVMe drive of a cloud, one at a time.
FIRST_READ_SECONDS: Final = 100e-6
# Pages are hot that were used in so many generations, the last of which has only begun: 10 to 15 seconds. In
# seconds of the disk's time phased, skewed, idle-giant, batch, leak, builds and scans cost 8.7, 11.0, 4.5, 18.2, 13.1,
# 13.4 and 20.2 with 3; with 2: 8.7, 11.2, 4.8, 19.0, 12.8, 13.4, 20.2; with 4: 9.4, 10.9, 4.5, 19.1, 14.9, 13.9, 20.2.
HOT: Final = 3
# What a tick counts for after one more: half after a minute. With 15 seconds, or 10 minutes, nothing changes by 1 %.
_FADE: Final = 0.5 ** (1 / 120)


class Use(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a guest did of late: sums over ticks, each of which counts for a little less than the next."""

    puts: float = 0.0  # pages, of more than zeros
    reads: float = 0.0  # pages, wherever they were; of an ephemeral pool those in tmem, for it puts what it misses
    warm_reads: float = 0.0  # of these, pages that are not hot
    warm_bytes: float = 0.0  # what pages that are not hot take, or would if they were in tmem


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One pool at one tick. Sizes in bytes of RAM; pages are counts since the tick before."""

    name: str
    has_file: bool  # whether pages can be demoted at all
    weight: int  # its share is in proportion to this
    minimum: int  # a target is never below
    cap: int  # nor above
    used: int
    target: int  # what holds now
    overhead: int  # of `used`, what no demotion gives back: the index above all
    page_bytes: int  # of RAM that one page takes, on average
    # By age in generations: what the pages last used then take, or would if they were in tmem. What is in the source
    # of an ephemeral pool alone, and was not used for long or ever, does not count.
    heat: tuple[int, ...]
    put: int  # pages, of more than zeros, since the pool was made
    use: Use
    puts: int
    refused: int
    file_reads: int
    is_ephemeral: bool = False  # its pages are copies of what a source holds
    read_seconds: float = FIRST_READ_SECONDS  # that a page takes to be read from the file or source, of late
    read_unknown: bool = False  # too few were read yet to tell


def demand(before: PoolSample | None, now: PoolSample, last: Demand | None = None) -> Demand:
    """A pool's demand from its last two samples (None: there is only one); *last* is what it was at *before*."""
    counters, ages = now.counters, now.ages
    earlier = before.counters if before else counters
    overhead = counters.used_bytes - sum(ages.stored_bytes) if ages.published else counters.index_bytes
    overhead = min(max(overhead, counters.index_bytes), counters.used_bytes)
    page = _page_bytes(counters)
    in_file = (*ages.in_file_pages[:-1], 0) if now.is_ephemeral else ages.in_file_pages
    heat = tuple([ram + page * n for ram, n in zip(ages.stored_bytes, in_file, strict=True)])
    cap = min(counters.limit_bytes, now.cap_bytes if now.cap_bytes is not None else counters.limit_bytes)
    # What nobody could demote stays; and no device works below its own minimum.
    stuck = 0 if now.has_file and now.served else counters.used_bytes
    minimum = max(now.minimum_bytes, counters.minimum_bytes, stuck)
    return Demand(
        name=now.name,
        has_file=now.has_file,
        weight=now.weight,
        minimum=minimum,
        cap=max(cap, minimum),
        used=counters.used_bytes,
        target=now.target_bytes,
        overhead=overhead,
        page_bytes=page,
        heat=heat,
        put=counters.puts - counters.puts_zero,
        use=_use(before, now, last.use, sum(heat[HOT:])) if before and last else Use(),
        puts=counters.puts - earlier.puts,
        refused=counters.puts_refused - earlier.puts_refused,
        file_reads=counters.file_reads - earlier.file_reads,
        is_ephemeral=now.is_ephemeral,
        read_unknown=counters.file_reads < ENOUGH_READS,
        read_seconds=_read_seconds(before, now, last.read_seconds if last else FIRST_READ_SECONDS),
    )


def _read_seconds(before: PoolSample | None, now: PoolSample, known: float) -> float:
    """Of the last thousand pages or so; *known*: what was known before. Without *before*, of all since it was made."""
    pages = now.counters.file_reads - (before.counters.file_reads if before else 0)
    nanoseconds = now.file_read_ns - (before.file_read_ns if before else 0)
    if pages <= 0 or nanoseconds <= 0:
        return known
    seconds = nanoseconds / 1e9 / pages
    if before:
        seconds = min(seconds, _JUMP * known)
    return known + (seconds - known) * pages / (pages + ENOUGH_PAGES)


def _use(before: PoolSample, now: PoolSample, use: Use, warm_bytes: int) -> Use:
    counters, earlier = now.counters, before.counters
    puts = counters.puts - earlier.puts - (counters.puts_zero - earlier.puts_zero)
    reads = counters.gets - earlier.gets
    if not now.is_ephemeral:
        reads += counters.file_reads - earlier.file_reads
    # With nothing published on either side, or nothing plausible, all since the pool was made would seem new.
    known = before.ages.published and now.ages.published and now.ages is not before.ages
    warm = _warm_reads(now) - _warm_reads(before) if known else 0
    return Use(
        puts=use.puts * _FADE + max(puts, 0),
        reads=use.reads * _FADE + max(reads, 0),
        warm_reads=use.warm_reads * _FADE + max(warm, 0),
        warm_bytes=use.warm_bytes * _FADE + warm_bytes,
    )


def _warm_reads(sample: PoolSample) -> int:
    """But for those of a source that were the first, or the first for long: they say nothing of what is kept."""
    ages = sample.ages
    return sum(ages.gets[HOT:]) + sum(ages.file_reads[HOT : -1 if sample.is_ephemeral else None])


def _page_bytes(counters: Counters) -> int:
    # Not from age statistics, which a guest that starts again after it freed everything is ahead of.
    if counters.pages_in_tmem < ENOUGH_PAGES:
        return FIRST_PAGE_BYTES
    return max(1, (counters.used_bytes - counters.index_bytes) // counters.pages_in_tmem)
