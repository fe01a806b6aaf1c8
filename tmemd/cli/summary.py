"""What a pool did since it was made, as people want to see it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

import msgspec

from tmemd.cli.activity import Latency
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import GENERATION_SECONDS, GENERATIONS, Histogram

# Up to which age, in generations, memory is added up: a few steps are enough to see what is idle.
_AGES: Final = (1, 3, 7, GENERATIONS - 2)
# A page of age n was last used n - 1 to n + 1 generations ago.
AGES_SECONDS: Final = tuple((age + 1) * GENERATION_SECONDS for age in _AGES)


class Age(msgspec.Struct, frozen=True):
    """Memory of pages by when they were last put or read."""

    seconds: float | None  # at most; None: longer ago than all before
    stored_bytes: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """None: there is nothing to say it of, or nobody asked for latencies and ages."""

    hit_share: float | None  # of the pages read, those that came from tmem: 0 to 1
    compression_ratio: float | None  # bytes of the pages in tmem for each byte that they take compressed
    put_seconds: Latency
    get_seconds: Latency
    spill_seconds: Latency
    file_read_seconds: Latency
    stored_by_age: list[Age]  # as last published; empty: nothing was yet


def summary(status: PoolStatus) -> Summary:
    """Of a pool, from its counters, latencies and ages."""
    counters, latencies = status.counters, status.latencies
    read = counters.gets + counters.file_reads
    return Summary(
        hit_share=counters.gets / read if read else None,
        compression_ratio=counters.compression,
        put_seconds=_latency(latencies.put if latencies else None),
        get_seconds=_latency(latencies.get if latencies else None),
        spill_seconds=_latency(latencies.spill if latencies else None),
        file_read_seconds=_latency(latencies.file_read if latencies else None),
        stored_by_age=_by_age(status.ages.stored_bytes) if status.ages and status.ages.published else [],
    )


def long_form(status: PoolStatus) -> dict[str, Any]:
    """One flat JSON object with all that is known and what follows from it."""
    known: dict[str, Any] = msgspec.to_builtins(summary(status))
    return status.flat() | known


def _latency(histogram: Histogram | None) -> Latency:
    return Latency.of(histogram) if histogram else Latency()


def _by_age(stored: tuple[int, ...]) -> list[Age]:
    upto = list(accumulate(stored))
    found, below = [], 0
    for age, seconds in zip(_AGES, AGES_SECONDS, strict=True):
        found.append(Age(seconds, upto[age] - below))
        below = upto[age]
    return [*found, Age(None, upto[-1] - below)]
