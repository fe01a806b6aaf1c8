# SPDX-License-Identifier: BSD-3-Clause
"""The demand of a pool, which policies go by."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from tests.support.recordings import pool
from tmemd.policy import Demand, demand
from tmemd.policy.demand import FIRST_READ_SECONDS, HOT, Use
from tmemd.store.poolfile import GENERATIONS
from tmemd.store.sample import PoolSample

MIB = 1 << 20


def by_age(**pages: int) -> tuple[int, ...]:
    return tuple(pages.get(f"a{age}", 0) for age in range(GENERATIONS))


def last_demand(*samples: PoolSample) -> Demand:
    """At the last of these, one tick apart."""
    known = demand(None, samples[0])
    for before, now in pairwise(samples):
        known = demand(before, now, known)
    return known


def sample(**values: Any) -> PoolSample:
    return pool("web", **{"used_bytes": 9 * MIB, "published": 1, "file_reads": (0,) * GENERATIONS, **values}).sample


def test_use_is_of_pages_that_are_not_hot_and_fades() -> None:
    first = sample(stored_bytes=by_age(a0=MIB, a2=2 * MIB, a3=3 * MIB))
    second = sample(stored_bytes=first.ages.stored_bytes, gets=by_age(a0=7, a2=5, a3=300, a15=100), puts=1000)
    use = last_demand(first, second).use
    assert HOT == 3
    assert (use.puts, use.warm_reads, use.warm_bytes) == (1000, 400, 3 * MIB)
    later = last_demand(first, second, *[second] * 120).use
    assert (later.puts, later.warm_reads) == pytest.approx((500, 200))
    assert later.warm_bytes > 80 * use.warm_bytes


def test_use_begins_anew_with_the_pool() -> None:
    first, second = sample(), sample(gets=by_age(a5=100), puts=10)
    known = last_demand(first, second)
    assert known.use.warm_reads == 100
    assert demand(None, second, known).use == demand(second, second, None).use == Use()


def test_what_was_only_ever_in_a_source_says_nothing() -> None:
    """An image is large, and read from end to end once."""
    read = by_age(a0=10, a5=20, a15=1_000_000)
    first = sample(is_ephemeral=True, in_file_pages=by_age(a5=7, a15=1 << 30))
    second = sample(is_ephemeral=True, in_file_pages=by_age(a5=7, a15=1 << 30), file_reads=read, gets=5, puts=1000)
    known = last_demand(first, second)
    assert known.is_ephemeral
    assert known.heat == by_age(a5=7 * known.page_bytes)
    assert (known.use.warm_reads, known.use.reads, known.use.puts) == (20, 5, 1000)


def test_the_time_of_a_read_is_that_of_the_last_thousand_pages() -> None:
    def at(pages: int, microseconds: int) -> PoolSample:
        now = pool("web", file_reads=pages).sample
        return msgspec.structs.replace(now, file_read_ns=microseconds * 1000)

    known = last_demand(at(0, 0), at(0, 0))
    assert known.read_seconds == FIRST_READ_SECONDS
    known = demand(None, at(99_000, 99_000 * 400))
    assert known.read_seconds == pytest.approx(397e-6)
    quick = demand(at(0, 0), at(1000, 1000 * 197), known)
    assert quick.read_seconds == pytest.approx(297e-6)
    assert demand(at(1000, 9), at(1000, 9), quick).read_seconds == quick.read_seconds
    assert demand(at(1000, 9), at(500, 3), quick).read_seconds == quick.read_seconds


def test_how_far_a_file_is_is_not_known_from_a_few_reads() -> None:
    assert demand(None, pool("web", file_reads=99).sample).read_unknown
    assert not demand(None, pool("web", file_reads=100).sample).read_unknown


def test_a_read_that_hung_for_long_is_no_distance() -> None:
    def at(pages: int, nanoseconds: int) -> PoolSample:
        return msgspec.structs.replace(pool("web", file_reads=pages).sample, file_read_ns=nanoseconds)

    known = demand(None, at(100_000, 100_000 * 100_000))
    hung = demand(at(0, 0), at(1, 60 * 10**9), known)
    assert hung.read_seconds == pytest.approx(known.read_seconds, rel=0.02)
    for _ in range(20):
        known = demand(at(0, 0), at(1000, 1000 * 10**7), known)
    assert known.read_seconds == pytest.approx(10e-3, rel=0.01), "one that is far is soon known"


def test_counters_that_fall_are_not_counted() -> None:
    high, low = sample(gets=by_age(a5=100), puts=10), sample()
    assert min(msgspec.structs.astuple(last_demand(high, low).use)) >= 0


def test_what_is_published_after_what_was_not_plausible_is_not_new() -> None:
    known = sample(gets=by_age(a5=1_000_000))
    unknown = sample(published=0)
    again = sample(gets=by_age(a5=1_000_100), published=2)
    assert last_demand(known, unknown, again).use.warm_reads == 0
    assert last_demand(unknown, again, sample(gets=by_age(a5=1_000_107), published=3)).use.warm_reads == 7
