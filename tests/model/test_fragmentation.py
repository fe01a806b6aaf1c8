# SPDX-License-Identifier: BSD-3-Clause
"""What random trims and failures leave of a pool's memory: it is used again, given back, and counted right."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.model.rig import OpenDevice, Rig
from tests.support.content import PAGE, compressible, content, incompressible
from tests.support.harness import MIB, taken
from tests.support.index import Kind, record_offset, words
from tmemd.binding import _core

Content = Callable[[int, int], bytes]

PAGES = 16384
LIMIT = 16 * MIB  # each of 250 classes may have a page that is not full
RAW_SLOT = 4112
RAW_SLOTS = 63  # in a span
SPAN = 256 << 10


@pytest.fixture
def ram(core_device: OpenDevice) -> Rig:
    """A device without a backing file, of twice as many pages as its limit has room for."""
    return core_device(PAGES * PAGE, LIMIT, disk=None)


def put(rig: Rig, pages: Iterable[int], make: Content, version: int) -> list[int]:
    """Write pages one by one until one is refused; returns those that were stored."""
    stored = []
    with suppress(OSError):
        for page in pages:
            rig.write(page * PAGE, make(page, version))
            stored.append(page)
    return stored


def trim(rig: Rig, pages: Iterable[int]) -> None:
    """Trim pages one by one."""
    for page in pages:
        _core.trim(rig.device, PAGE, page * PAGE, 0)


def wrong(rig: Rig, pages: Iterable[int], make: Content, version: int) -> list[int]:
    """Pages that do not hold what was written."""
    return [page for page in pages if rig.read(page * PAGE, PAGE) != make(page, version)]


def live_bytes(rig: Rig) -> int:
    """Bytes of the slots that the index points at."""
    return sum(word.slot for word in words(rig.pool) if word.kind is Kind.TMEM)


def beside_index(rig: Rig) -> int:
    """Bytes taken for records."""
    counters = rig.counters()
    return counters.used_bytes - rig.identity.index_offset - counters.index_bytes


def some_of(pages: Sequence[int], percent: int) -> list[int]:
    """A share of the pages, chosen at random but always the same ones."""
    return sorted(random.Random(percent).sample(pages, len(pages) * percent // 100))


@pytest.mark.parametrize("make", [incompressible, content])
@pytest.mark.parametrize("again", [incompressible, content])
@pytest.mark.parametrize("percent", [70, 90])
@pytest.mark.parametrize("settled", [True, False])
def test_after_random_trims_the_pool_is_filled_to_its_limit_again(
    ram: Rig, make: Content, again: Content, percent: int, settled: bool
) -> None:
    stored = put(ram, range(PAGES), make, 1)
    gone = some_of(stored, percent)
    trim(ram, gone)
    if settled:
        ram.device.compact(1 << 30)
    anew = put(ram, [*gone, *range(len(stored), PAGES)], again, 2)
    assert len(anew) < PAGES - len(stored) + len(gone)  # all that could be stored was
    assert live_bytes(ram) >= 0.95 * (LIMIT - ram.identity.index_offset - ram.counters().index_bytes)
    assert wrong(ram, anew, again, 2) == wrong(ram, sorted({*stored} - {*gone}), make, 1) == []
    assert ram.counters().used_bytes == taken(ram.pool) <= LIMIT


def test_spans_do_not_run_out(core_device: OpenDevice) -> None:
    pages = 32768  # the spans that each class may have partly filled are a small part of those for these
    rig = core_device(pages * PAGE, 2 * pages * PAGE, disk=None)
    assert len(put(rig, range(pages), incompressible, 1)) == pages
    for percent in 70, 75, 80:
        trim(rig, gone := some_of(range(pages), percent))
        rig.device.compact(1 << 30)
        assert len(put(rig, gone, incompressible, percent)) == len(gone)
    trim(rig, gone := some_of(range(pages), 90))
    assert len(put(rig, gone, compressible, 2)) == len(gone)


@pytest.mark.parametrize("make", [incompressible, content])
@pytest.mark.parametrize("percent", [70, 90])
@pytest.mark.parametrize("attach", [False, True])
def test_once_settled_hardly_more_than_the_records_is_taken(
    ram: Rig, make: Content, percent: int, attach: bool
) -> None:
    stored = put(ram, range(PAGES), make, 1)
    trim(ram, some_of(stored, percent))
    if attach:
        ram.reattach(clean=False)
    ram.device.compact(1 << 30)
    live = [word for word in words(ram.pool) if word.kind is Kind.TMEM]
    classes = len({word.slot for word in live})
    # A raw page's span leaves 1.2 % at its end; and the last span of a class has a page that is not full.
    assert beside_index(ram) <= live_bytes(ram) * 1.016 + (classes + 1) * PAGE
    moves = ram.counters().moves
    assert ram.device.compact(1 << 30) == 0
    assert ram.counters().moves == moves
    assert wrong(ram, sorted({*stored} - {*some_of(stored, percent)}), make, 1) == []


def test_one_hole_takes_one_move(ram: Rig) -> None:
    stored = put(ram, range(2 * RAW_SLOTS + 10), incompressible, 1)
    ram.device.compact(1 << 30)
    before = ram.counters().moves
    trim(ram, stored[5:6])
    ram.device.compact(1 << 30)
    assert ram.counters().moves == before + 1
    assert wrong(ram, stored[:5] + stored[6:], incompressible, 1) == []


def keep_of_each_span(rig: Rig, live: Sequence[int]) -> list[list[int]]:
    """Fill a span of raw pages for each number, then trim all but so many of its pages; returns those that are left."""
    spans = [[*range(at, at + RAW_SLOTS)] for at in range(0, len(live) * RAW_SLOTS, RAW_SLOTS)]
    assert put(rig, [page for span in spans for page in span], incompressible, 1)
    for span, n in zip(spans, live, strict=True):
        assert len({record_offset(rig.pool, page) // SPAN for page in span}) == 1
        trim(rig, span[n:])
    return [span[:n] for span, n in zip(spans, live, strict=True)]


def test_puts_take_slots_where_the_fewest_are_free(ram: Rig) -> None:
    left = keep_of_each_span(ram, [20, 60, 3, 40])
    anew = put(ram, range(1000, 1003), incompressible, 1)
    assert {record_offset(ram.pool, page) // SPAN for page in anew} == {record_offset(ram.pool, left[1][0]) // SPAN}


def test_compaction_empties_the_emptiest_span_into_the_fullest(ram: Rig) -> None:
    left = keep_of_each_span(ram, [60, 63, 3, 63])
    before = ram.counters().moves
    ram.device.compact(1 << 30)
    assert ram.counters().moves == before + 3
    assert len({record_offset(ram.pool, page) // SPAN for page in left[0] + left[2]}) == 1


def test_an_empty_span_is_kept_for_the_next_put_until_settled(ram: Rig) -> None:
    for _ in range(3):
        trim(ram, put(ram, range(1000), incompressible, 1))
    ram.device.compact(1 << 30)
    before = taken(ram.pool)
    for page in range(2):
        put(ram, [page], incompressible, 1)
        assert taken(ram.pool) == before + 2 * PAGE
        trim(ram, [page])
    assert taken(ram.pool) == before + 2 * PAGE
    ram.device.compact(1 << 30)
    assert ram.counters().used_bytes == taken(ram.pool) == before


def test_near_the_target_a_class_takes_no_more_than_it_needs(ram: Rig) -> None:
    far: set[int] = set()
    near: set[int] = set()
    for page in range(PAGES):
        before = ram.counters().used_bytes
        if not put(ram, [page], incompressible, 1):
            break
        (near if ram.limit - before < 64 * PAGE else far).add(ram.counters().used_bytes - before)
    assert max(far) == 16 * PAGE
    assert max(near) <= 2 * PAGE  # for the first slot of a span


def test_with_a_file_a_put_is_spilled_unless_much_is_free(core_device: OpenDevice) -> None:
    rig = core_device(1024 * PAGE, 3 * MIB)
    rig.write(200 * PAGE, b"".join(incompressible(page, 1) for page in range(200, 850)))
    put(rig, range(850, 1000), incompressible, 1)
    assert rig.counters().spills > 0
    trim(rig, range(200, 210))
    spills = rig.counters().spills
    put(rig, range(600, 604), compressible, 1)
    assert (rig.counters().spills, rig.counters().moves) == (spills + 4, 0)
    trim(rig, some_of(range(220, 600), 50))
    put(rig, range(604, 608), compressible, 1)
    assert rig.counters().spills == spills + 4
    assert rig.counters().moves > 0


def damage(rig: Rig, pages: Iterable[int], number: int) -> None:
    """Write another page's number into records."""
    for page in pages:
        os.pwrite(rig.pool_fd, number.to_bytes(4, "little"), record_offset(rig.pool, page))


@pytest.mark.parametrize("number", [0xFFFFFFFF, PAGES, 0, None])
def test_records_that_cannot_be_moved_do_not_stop_their_class(ram: Rig, number: int | None) -> None:
    stored = put(ram, range(1, PAGES), incompressible, 1)
    gone = some_of(stored, 70)
    kept = sorted({*stored} - {*gone})
    damaged = kept[::40]  # every other span has one
    trim(ram, gone)
    damage(ram, damaged, kept[1] if number is None else number)
    ram.device.compact(1 << 30)
    moves = ram.counters().moves
    ram.device.compact(1 << 30)
    assert ram.counters().moves == moves
    # Each may keep one page of a raw record's two from being given back, and some of a span.
    assert beside_index(ram) <= live_bytes(ram) * 1.016 + (len(damaged) + 2) * 2 * PAGE
    assert wrong(ram, sorted({*kept} - {*damaged}), incompressible, 1) == []
    for page in damaged:
        with pytest.raises(OSError, match=r"Errno 5\b"):
            ram.read(page * PAGE, PAGE)
    trim(ram, damaged)
    ram.device.compact(1 << 30)
    assert beside_index(ram) <= live_bytes(ram) * 1.016 + 2 * PAGE
    assert_free_slots_are_there(ram)


def assert_free_slots_are_there(rig: Rig) -> None:
    """As many raw pages can be put without any more memory as there are said to be free slots, and no more."""
    free = rig.device.free_slot_bytes()
    rig.target(rig.minimum)
    held = {page for page, word in enumerate(words(rig.pool)) if word.kind is Kind.TMEM}
    anew = put(rig, [page for page in range(PAGES) if page not in held], incompressible, 9)
    assert free == len(anew) * RAW_SLOT
    assert wrong(rig, anew, incompressible, 9) == []
    assert rig.counters().used_bytes == taken(rig.pool)


@pytest.mark.slow
@pytest.mark.parametrize("moves", [0, 1, 100, 150, 200, 1 << 30])
@pytest.mark.parametrize("damaged", [False, True])
def test_free_slots_are_counted_right_wherever_compaction_stops(ram: Rig, moves: int, damaged: bool) -> None:
    stored = put(ram, range(PAGES), incompressible, 1)
    trim(ram, some_of(stored, 70))
    if damaged:
        damage(ram, sorted({*stored} - {*some_of(stored, 70)})[::10], PAGES)
    ram.device.compact(moves)
    assert_free_slots_are_there(ram)


def test_a_pool_that_was_trimmed_and_abandoned_is_counted_right(ram: Rig) -> None:
    stored = put(ram, range(PAGES), incompressible, 1)
    trim(ram, some_of(stored, 70))
    ram.device.compact(100)
    ram.reattach(clean=False)
    assert_free_slots_are_there(ram)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that is smaller than the pool's limit."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def free_pages(path: Path) -> int:
    """Pages that a file system has left."""
    return os.statvfs(path).f_bavail * os.statvfs(path).f_frsize // PAGE


@pytest.mark.parametrize("left", range(1, 18))
def test_what_a_full_tmpfs_gave_in_part_is_given_back(small: Path, core_device: OpenDevice, left: int) -> None:
    rig = core_device(PAGES * PAGE, LIMIT, disk=None, pools=small)
    full = put(rig, range(PAGES), incompressible, 1)
    # So much of it is taken by others that raw pages, which grow by several pages, find less than they want.
    trim(rig, full)
    some = put(rig, range(520 - left), incompressible, 2)
    with (small / "others").open("wb") as others:
        os.posix_fallocate(others.fileno(), 0, (free_pages(small) - left) * PAGE)
        more = put(rig, range(1000, 1100), incompressible, 2)
        assert rig.counters().used_bytes == taken(rig.pool)
        used = rig.counters().used_bytes
        assert free_pages(small) + (used - taken(rig.pool)) // PAGE <= 1
    assert wrong(rig, [*some, *more], incompressible, 2) == []
    (small / "others").unlink()
    assert put(rig, range(1100, 1110), incompressible, 2) == list(range(1100, 1110))


def test_a_page_too_few_for_a_slot_is_left_to_others(small: Path, core_device: OpenDevice) -> None:
    rig = core_device(PAGES * PAGE, LIMIT, disk=None, pools=small)
    with (small / "others").open("wb") as others:
        os.posix_fallocate(others.fileno(), 0, (free_pages(small) - 1) * PAGE)
        used = rig.counters().used_bytes
        for _ in range(3):
            assert put(rig, [1], incompressible, 1) == []
        assert (free_pages(small), rig.counters().used_bytes, taken(rig.pool)) == (1, used, used)
        assert put(rig, [1], compressible, 1) == [1]
