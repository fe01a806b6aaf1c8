"""What a pool did between two looks at it: rates, shares and latencies, as people want to see them."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd.protocol import PoolStatus
from tmemd.store.latency import difference, quantile
from tmemd.store.poolfile import Histogram


class Latency(msgspec.Struct, frozen=True):
    """Of one kind of operation, in seconds; None when there was none."""

    median: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        """What a histogram says."""
        return cls(quantile(histogram, 0.5), quantile(histogram, 0.99))


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, now and in the interval before. Sizes in bytes, rates in pages a second, shares from 0 to 1."""

    name: str
    weight: int
    size: int
    target_bytes: int
    used_bytes: int
    pages_in_tmem: int
    pages_in_file: int
    compression: float | None  # bytes of the pages in tmem for each byte that they take compressed; None: no pages
    hit_share: float | None  # of the pages read, those that came from tmem; None: none was read
    gets: float
    puts: float
    refusals: float
    spills: float
    demotions: float
    file_reads: float
    put_seconds: Latency
    get_seconds: Latency
    spill_seconds: Latency
    file_read_seconds: Latency
    state: str  # 'served', 'idle' (by nobody), 'unfinished', or 'damaged'
    warnings: list[str]  # in a few words each, the gravest first


_COUNTED: Final = ("gets", "puts", "puts_refused", "spills", "demotions", "file_reads")
_GRAVE: Final = {
    "pages_lost": "lost pages", "bad_checksums": "bad checksums", "io_errors": "I/O errors",
    "sync_failed": "a failed sync",
}  # fmt: skip


def activity(before: PoolStatus | None, now: PoolStatus, seconds: float) -> Activity:
    """What *now* says of a pool that looked like *before* as many *seconds* ago (None: nobody looked)."""
    counters = now.counters
    interval = _Interval(before, now, seconds)
    gets, file_reads = interval.rate("gets"), interval.rate("file_reads")
    return Activity(
        name=now.name,
        weight=now.settings.weight,
        size=now.size,
        target_bytes=now.target_bytes,
        used_bytes=counters.used_bytes,
        pages_in_tmem=counters.pages_in_tmem,
        pages_in_file=counters.pages_in_file,
        compression=counters.compression,
        hit_share=gets / (gets + file_reads) if gets + file_reads else None,
        gets=gets,
        puts=interval.rate("puts"),
        refusals=interval.rate("puts_refused"),
        spills=interval.rate("spills"),
        demotions=interval.rate("demotions"),
        file_reads=file_reads,
        put_seconds=interval.latency("put"),
        get_seconds=interval.latency("get"),
        spill_seconds=interval.latency("spill"),
        file_read_seconds=interval.latency("file_read"),
        state="damaged" if now.error else "unfinished" if now.unfinished else "served" if now.served else "idle",
        warnings=warnings(now),
    )


def warnings(status: PoolStatus) -> list[str]:
    """What somebody should know or do something about, in a few words each, the gravest first."""
    if status.error:
        return ["damaged"]
    if status.unfinished:
        return ["unfinished"]
    counters = status.counters
    found = [words for field, words in _GRAVE.items() if getattr(counters, field)]
    if status.overtakes:
        found.append("takes more")
    if status.never_trims:
        found.append("never trims")
    if status.frozen:
        found.append("frozen")
    if not status.served:
        found.append("idle")
    return found


class _Interval:
    """Two looks at a pool, if the earlier one is of any use."""

    def __init__(self, before: PoolStatus | None, now: PoolStatus, seconds: float) -> None:
        usable = before and before.error is None and now.error is None and seconds > 0
        self._before = before if before and usable and not _is_another(before, now) else None
        self._now = now
        self._seconds = seconds

    def rate(self, counter: str) -> float:
        """How much a counter rose in a second; 0 where nobody looked before."""
        if self._before is None:
            return 0.0
        rise: int = getattr(self._now.counters, counter) - getattr(self._before.counters, counter)
        return rise / self._seconds

    def latency(self, operation: str) -> Latency:
        """How long the operations in between took."""
        if self._before is None or self._before.latencies is None or self._now.latencies is None:
            return Latency()
        histogram = difference(getattr(self._before.latencies, operation), getattr(self._now.latencies, operation))
        return Latency.of(histogram)


def _is_another(before: PoolStatus, now: PoolStatus) -> bool:
    """Whether the pool was made anew meanwhile: what is only ever counted up has fallen."""
    return any(getattr(now.counters, field) < getattr(before.counters, field) for field in _COUNTED)
