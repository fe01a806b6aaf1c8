# SPDX-License-Identifier: BSD-3-Clause
"""What a full cache device keeps: the rule of docs/decisions/0011-what-a-cache-keeps.md, on the core."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.support.cache_replay import Request, hits, load, replay
from tests.support.caches import LRU
from tests.support.harness import ROOT

CAPACITY = 1024
SCANNED = range(2048, 10 * CAPACITY)


def reads(pages: Iterable[int]) -> list[Request]:
    return [Request(page, 1, True) for page in pages]


def hit_pages(before: list[Request], measured: list[Request]) -> float:
    """How many pages of *measured* a pool had that saw *before* first."""
    pages = SCANNED.stop
    alone = replay(before, pages, CAPACITY).hits * len(before)
    return (replay([*before, *measured], pages, CAPACITY).hits * (len(before) + len(measured)) - alone) / 100


def test_a_scan_leaves_what_was_used_again() -> None:
    hot = reads(range(CAPACITY // 2))
    assert hit_pages([*hot, *hot, *reads(SCANNED)], hot) >= 0.95 * len(hot)


def test_a_loop_larger_than_the_pool_finds_some_of_its_pages() -> None:
    """LRU finds none. 5.7 % here; a busy machine puts what missed later, and finds 5.0."""
    loop = reads(SCANNED)
    assert replay(loop * 4, SCANNED.stop, CAPACITY).hits >= 4


def test_pages_that_come_back_soon_are_admitted_however_many_are_new() -> None:
    distance = CAPACITY // 4  # twice as many pages are used in between
    twice = [page for new in range(distance, 9 * CAPACITY) for page in (new, new - distance)]
    assert replay(reads(twice), SCANNED.stop, CAPACITY).hits >= 40  # of the 50 that LRU has


def more_than_lru(name: str, percent: int) -> float:
    """Points by which the core is better, on a recorded trace, with RAM for so much of its distinct pages."""
    trace = load(ROOT / "benchmarks" / "traces" / f"{name}.csv.xz")
    found = replay(trace.requests, trace.pages, trace.pages * percent // 100)
    return found.hits - hits(LRU(found.held, trace.pages), trace.requests)


@pytest.mark.parametrize("percent", [10, 50])
@pytest.mark.parametrize("name", ["boot", "build"])
def test_recorded_guests_find_as_much_as_under_lru(name: str, percent: int) -> None:
    assert more_than_lru(name, percent) >= -1


@pytest.mark.slow
def test_a_recorded_scan_leaves_ten_points_more_than_under_lru() -> None:
    assert more_than_lru("scan", 25) >= 10
