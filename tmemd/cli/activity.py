# SPDX-License-Identifier: BSD-3-Clause
"""What a pool did, between two looks at it or since it was made: rates, shares and latencies as people want them."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, Final

import msgspec

from tmemd.protocol import PoolState, PoolStatus
from tmemd.store.latency import difference, quantile
from tmemd.store.poolfile import GENERATION_SECONDS, GENERATIONS, Histogram, Latencies, PoolKind


class Latency(msgspec.Struct, frozen=True):
    """Of one kind of operation, in seconds; None when there was none."""

    median: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, histogram: Histogram | None) -> Latency:
        """What a histogram says."""
        return cls(quantile(histogram, 0.5), quantile(histogram, 0.99)) if histogram else cls()


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, now and in the interval before. Sizes in bytes, rates in pages a second, shares from 0 to 1."""

    name: str
    kind: PoolKind | None
    weight: int
    size: int
    target_bytes: int
    used_bytes: int
    pages_in_tmem: int
    pages_in_file: int
    compression_ratio: (
        float | None
    )  # bytes of the pages in tmem for each byte that they take compressed; None: no pages
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
    state: PoolState
    warnings: list[str]  # in a few words each, the gravest first

    def builtins(self) -> dict[str, Any]:
        """For JSON: what `PoolStatus.flat` has is called as there; old names go with the next release."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        named = {new: found[old] for old, new in _NAMES.items()}
        return found | named | {"compression": self.compression_ratio}


_NAMES: Final = {
    "size": "size_bytes", "gets": "gets_per_second", "puts": "puts_per_second",
    "refusals": "puts_refused_per_second", "spills": "spills_per_second", "demotions": "demotions_per_second",
    "file_reads": "file_reads_per_second",
}  # fmt: skip
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
        kind=now.kind,
        weight=now.settings.weight,
        size=now.size,
        target_bytes=now.target_bytes,
        used_bytes=counters.used_bytes,
        pages_in_tmem=counters.pages_in_tmem,
        pages_in_file=counters.pages_in_file,
        compression_ratio=counters.compression,
        hit_share=gets / (gets + file_reads) if gets + file_reads else None,
        gets=gets,
        puts=interval.rate("puts"),
        refusals=interval.rate("puts_refused"),
        spills=interval.rate("spills"),
        demotions=interval.rate("demotions"),
        file_reads=file_reads,
        state=now.state,
        warnings=warnings(now),
        **{f"{operation}_seconds": interval.latency(operation) for operation in Latencies.__struct_fields__},
    )


def warnings(status: PoolStatus) -> list[str]:
    """What somebody should know or do something about, in a few words each, the gravest first."""
    if status.error:
        return ["damaged"]
    if status.unfinished:
        return ["unfinished"]
    counters = status.counters
    found = [words for field, words in _GRAVE.items() if getattr(counters, field)]
    if status.served and counters.is_fenced:
        found.append("fenced")
    if status.is_away:
        found.append("file is away")
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


# Up to which age, in generations, memory is added up: a few steps are enough to see what is idle.
_AGES: Final = (1, 3, 7, GENERATIONS - 2)
# A page of age n was last used n - 1 to n + 1 generations ago.
AGES_SECONDS: Final = tuple((age + 1) * GENERATION_SECONDS for age in _AGES)


class Age(msgspec.Struct, frozen=True):
    """Memory of pages by when they were last put or read."""

    seconds: float | None  # at most; None: longer ago than all before
    stored_bytes: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Since the pool was made. None: there is nothing to say it of, or nobody asked for latencies and ages."""

    hit_share: float | None  # of the pages read, those that came from tmem: 0 to 1
    compression_ratio: float | None  # bytes of the pages in tmem for each byte that they take compressed
    put_seconds: Latency
    get_seconds: Latency
    spill_seconds: Latency
    file_read_seconds: Latency
    stored_by_age: list[Age]  # as last published; empty: nothing was yet


def summary(status: PoolStatus) -> Summary:
    """Of a pool, from its counters, latencies and ages."""
    counters = status.counters
    read = counters.gets + counters.file_reads
    return Summary(
        hit_share=counters.gets / read if read else None,
        compression_ratio=counters.compression,
        stored_by_age=_by_age(status.ages.stored_bytes) if status.ages and status.ages.published else [],
        **{
            f"{operation}_seconds": Latency.of(getattr(status.latencies, operation, None))
            for operation in Latencies.__struct_fields__
        },
    )


def long_form(status: PoolStatus) -> dict[str, Any]:
    """One flat JSON object with all that is known and what follows from it."""
    known: dict[str, Any] = msgspec.to_builtins(summary(status))
    return short_form(status) | known


def short_form(status: PoolStatus) -> dict[str, Any]:
    """The same without what needs latencies and ages."""
    return status.flat() | {"warnings": warnings(status)}


def _by_age(stored: tuple[int, ...]) -> list[Age]:
    upto = list(accumulate(stored))
    bounds = [0, *(upto[age] for age in _AGES), upto[-1]]
    return [
        Age(seconds, end - start) for seconds, (start, end) in zip((*AGES_SECONDS, None), pairwise(bounds), strict=True)
    ]
