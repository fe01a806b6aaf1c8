# SPDX-License-Identifier: BSD-3-Clause
"""How much is to be demoted for pages to come."""

from __future__ import annotations

from tests.support import fakes
from tmemd.device.watermark import FreeWatermark
from tmemd.store.poolfile import Counters

MIB = 1 << 20
TARGET = 100 * MIB


def counters(**values: int) -> Counters:
    """Of a pool whose pages take 1 KiB each."""
    return fakes.counters(**({"used_bytes": TARGET, "pages_in_tmem": TARGET >> 10} | values))


def missing(watermark: FreeWatermark, room: int, back: int = 0, **values: int) -> int:
    """A tick later, with so much room."""
    return watermark.missing(counters(used_bytes=TARGET - room, **values), back, TARGET)


def watching(percent: int = 10) -> FreeWatermark:
    """One that has seen the pool once."""
    watermark = FreeWatermark(percent)
    assert missing(watermark, 0) == 0
    return watermark


def test_nothing_is_demoted_while_nothing_comes_in() -> None:
    watermark = watching()
    assert missing(watermark, 0, gets=1000, file_reads=1000) == 0
    assert missing(watermark, 0, gets=2000, file_reads=1000) == 0


def test_pages_of_zeros_and_overwritten_ones_need_no_room() -> None:
    assert missing(watching(), 0, puts=1000, puts_zero=1000) == 0
    assert missing(watching(), 0, puts=1000, invalidates=1000) == 0


def test_a_refused_page_needs_room_even_where_another_went() -> None:
    assert missing(watching(), 0, puts=10, puts_refused=10, invalidates=10) > 0


def test_a_page_that_came_back_soon_needs_room() -> None:
    assert missing(watching(), 0, back=10) > 0


def test_as_much_is_made_free_as_was_asked_for() -> None:
    assert missing(watching(10), 0, puts=1) == TARGET // 10
    assert missing(watching(5), 0, puts=1) == TARGET // 20


def test_what_is_free_is_taken_into_account() -> None:
    assert missing(watching(), TARGET // 10, puts=100_000) == 0
    assert missing(watching(), TARGET // 10 * 3 // 4, puts=100_000) == 0, "above the low watermark"
    assert missing(watching(), TARGET // 100, puts=100_000) == TARGET // 10 - TARGET // 100


def test_zero_percent_is_none() -> None:
    assert missing(watching(0), 0, puts=100_000, puts_refused=100_000) == 0
