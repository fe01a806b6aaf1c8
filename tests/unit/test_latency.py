# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import math
from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import histogram
from tmemd.store.latency import difference, quantile
from tmemd.store.poolfile import LATENCIES, LATENCY_BOUNDS_NS, Histogram

LAST = LATENCIES - 1


def test_no_operations_have_no_quantile() -> None:
    assert quantile(histogram(), 0.5) is None


def test_a_quantile_is_interpolated_inside_its_bucket() -> None:
    # Bucket 4 is of 768 to 1024 ns (bounds 256, 384, 512, 768, 1024).
    assert quantile(histogram(4, count=100), 0.5) == pytest.approx(896e-9)
    assert quantile(histogram(4, count=100), 1.0) == pytest.approx(1024e-9)
    assert quantile(histogram(0, count=4), 0.25) == pytest.approx(64e-9)


def test_quantiles_tell_the_many_from_the_few() -> None:
    both = Histogram(0, tuple(99 if n == 2 else 1 if n == 20 else 0 for n in range(LATENCIES)))
    assert quantile(both, 0.5) == pytest.approx((384 + 128 * 50 / 99) * 1e-9)
    assert quantile(both, 0.99) == pytest.approx(512e-9)
    assert quantile(both, 1.0) == pytest.approx(LATENCY_BOUNDS_NS[20] * 1e-9)


def test_beyond_the_last_bound_it_is_that_bound() -> None:
    assert quantile(histogram(LAST, count=3), 0.99) == pytest.approx(LATENCY_BOUNDS_NS[-1] * 1e-9)


@given(
    st.lists(st.integers(0, 2 * LATENCY_BOUNDS_NS[-1]), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(latencies: list[int], share: float) -> None:
    buckets = [bisect_right(LATENCY_BOUNDS_NS, latency) for latency in latencies]
    found = quantile(histogram(*buckets), share)
    true = sorted(buckets)[max(0, math.ceil(share * len(buckets) - 1e-9) - 1)]
    low = LATENCY_BOUNDS_NS[true - 1] if true else 0
    high = LATENCY_BOUNDS_NS[min(true, LAST - 1)]
    assert found is not None
    assert low * 0.999999 <= found * 1e9 <= high * 1.000001


def test_a_difference_is_what_came_since() -> None:
    before, now = histogram(3, count=5, sum_ns=100), histogram(3, 8, count=7, sum_ns=900)
    since = difference(before, now)
    assert (since.counts[3], since.counts[8], since.count, since.sum_ns) == (2, 7, 9, 800)
    assert difference(now, now).count == 0


def test_without_an_earlier_look_or_with_another_pool_all_counts() -> None:
    now = histogram(3, count=2, sum_ns=10)
    assert difference(None, now) == now
    assert difference(histogram(3, count=3), now) == now
