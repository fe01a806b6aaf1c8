# SPDX-License-Identifier: BSD-3-Clause
"""Quantiles from latency histograms, of all time or of the interval between two looks."""

from __future__ import annotations

from itertools import accumulate
from typing import Final

from tmemd.store.poolfile import LATENCY_BOUNDS_NS, Histogram

_NS: Final = 1e-9


def difference(before: Histogram | None, now: Histogram) -> Histogram:
    """What happened between two looks at one histogram.

    All of *now* where there was no earlier look, or where the pool was made anew since: a count that fell says so.
    """
    if before is None or any(map(int.__lt__, now.counts, before.counts)):
        return now
    return Histogram(max(0, now.sum_ns - before.sum_ns), tuple(map(int.__sub__, now.counts, before.counts)))


def quantile(histogram: Histogram, share: float) -> float | None:
    """The latency in seconds that *share* (0 to 1) of the operations did not exceed; None when there were none.

    Interpolated inside the bucket that it falls into, as Prometheus's histogram_quantile() does; in the last bucket,
    which has no upper bound, it is that bucket's lower one.
    """
    rank = share * histogram.count
    if not histogram.count:
        return None
    below = 0
    for number, upto in enumerate(accumulate(histogram.counts)):
        if upto >= rank and upto > below:
            return _inside(number, (rank - below) / (upto - below)) * _NS
        below = upto
    raise AssertionError("the last bucket ends the loop")


def _inside(bucket: int, part: float) -> float:
    low = LATENCY_BOUNDS_NS[bucket - 1] if bucket else 0
    high = LATENCY_BOUNDS_NS[bucket] if bucket < len(LATENCY_BOUNDS_NS) else low
    return low + (high - low) * part
