# SPDX-License-Identifier: BSD-3-Clause
"""Which pages are demoted, and how many writes that may cost."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.model.rig import OpenDevice, Rig
from tests.support.content import PAGE, compressible, incompressible
from tests.support.harness import MIB, taken
from tests.support.index import Kind, kinds, record_offset
from tmemd.binding import _core
from tmemd.store import poolfile

PAGES = 4096
ALL = 1 << 40
FIRST = 1100  # no page from here on is written through, but for the last


@pytest.fixture
def rig(core_device: OpenDevice) -> Rig:
    """A device with room for all its pages."""
    return core_device(2 * PAGES * PAGE, 32 * MIB)


def put(rig: Rig, pages: range) -> None:
    """Store pages, every fourth one incompressible."""
    for page in pages:
        rig.write(page * PAGE, (compressible if page % 4 else incompressible)(page, 1))


def wrong(rig: Rig, pages: range) -> list[int]:
    """Pages that do not hold what `put` stored."""
    return [
        page for page in pages if rig.read(page * PAGE, PAGE) != (compressible if page % 4 else incompressible)(page, 1)
    ]


def filed(rig: Rig, pages: range) -> list[int]:
    """Pages that are in the file only."""
    where = kinds(rig.pool)
    return [page for page in pages if where[page] is Kind.FILE]


def test_pages_younger_than_asked_for_stay(rig: Rig) -> None:
    old, young = range(FIRST, FIRST + 200), range(FIRST + 200, FIRST + 400)
    put(rig, old)
    rig.device.begin_generation()
    rig.device.begin_generation()
    put(rig, young)
    assert rig.device.demote(ALL, min_age=3) == 0
    rig.device.demote(ALL, min_age=2)
    assert filed(rig, range(FIRST, FIRST + 400)) == list(old)


def test_only_incompressible_pages_can_be_chosen(rig: Rig) -> None:
    pages = range(FIRST, FIRST + 400)
    put(rig, pages)
    rig.device.demote(ALL, raw_only=True)
    assert filed(rig, pages) == [page for page in pages if page % 4 == 0]
    assert wrong(rig, pages) == []


def test_what_demotion_writes_is_counted_and_bounded(rig: Rig) -> None:
    pages = range(FIRST, FIRST + 400)
    put(rig, pages)
    poolfile.write_demotion_writes(rig.pool_fd, 70)
    assert rig.device.demote(ALL, bounded=True) > 0
    assert rig.device.demote(ALL, bounded=True) == 0
    assert (len(filed(rig, pages)), rig.counters().demotion_writes) == (70, 70)
    poolfile.write_demotion_writes(rig.pool_fd, 100)
    rig.device.demote(ALL, bounded=True)
    assert (len(filed(rig, pages)), rig.counters().demotion_writes) == (100, 100)
    assert wrong(rig, pages) == []


def test_a_bound_that_is_gone_or_not_for_this_demotion_does_not_hold(rig: Rig) -> None:
    pages = range(FIRST, FIRST + 400)
    put(rig, pages)
    poolfile.write_demotion_writes(rig.pool_fd, 10)
    rig.device.demote(100 * PAGE)
    assert rig.counters().demotion_writes == len(filed(rig, pages)) > 10
    poolfile.write_demotion_writes(rig.pool_fd, None)
    rig.device.demote(ALL, bounded=True)
    assert len(filed(rig, pages)) == rig.counters().demotion_writes == 400


def test_pages_that_the_file_holds_cost_no_write_and_are_not_bound(rig: Rig) -> None:
    clean, dirty = range(FIRST, FIRST + 200), range(FIRST + 200, FIRST + 400)
    rig.frozen(True)
    put(rig, clean)
    rig.frozen(False)
    _core.cache(rig.device, len(clean) * PAGE, FIRST * PAGE, 0)
    put(rig, dirty)
    # Among those that are in the file already, some that are not.
    put(rig, range(FIRST, FIRST + 200, 10))
    poolfile.write_demotion_writes(rig.pool_fd, 0)
    rig.device.demote(ALL, bounded=True)
    assert filed(rig, range(FIRST, FIRST + 400)) == [page for page in clean if page % 10 != FIRST % 10]
    assert rig.counters().demotion_writes == 0
    rig.device.demote(ALL)
    assert rig.counters().demotion_writes == 200 + 20
    assert wrong(rig, range(FIRST, FIRST + 400)) == []


def age(rig: Rig, times: int) -> None:
    """Begin the next generations."""
    for _ in range(times):
        rig.device.begin_generation()


def test_a_page_that_cannot_be_moved_is_looked_at_once_in_a_generation(rig: Rig) -> None:
    put(rig, range(FIRST, FIRST + 100))
    os.pwrite(rig.pool_fd, b"damaged", record_offset(rig.pool, FIRST + 50) + 12)
    age(rig, 2)
    assert rig.device.demote(ALL, min_age=2, bounded=True) > 0
    put(rig, range(FIRST + 200, FIRST + 300))
    for generations in 1, 2:
        for _ in range(5):
            assert rig.device.demote(ALL, min_age=2, bounded=True) == 0
        assert rig.counters().bad_checksums == generations
        age(rig, 1)
    assert rig.device.demote(ALL, min_age=2, bounded=True) > 0, "others have grown old meanwhile"
    age(rig, 1)
    rig.device.demote(ALL, min_age=2, bounded=True)
    before = rig.counters().bad_checksums
    rig.device.demote(ALL, min_age=2)
    assert rig.counters().bad_checksums == before + 1, "whoever asks for it himself has it looked at"


def test_when_the_bound_rises_what_was_in_vain_is_tried_again(rig: Rig) -> None:
    pages = range(FIRST, FIRST + 400)
    put(rig, pages)
    age(rig, 2)
    for bound in 0, 70, 100:
        poolfile.write_demotion_writes(rig.pool_fd, bound)
        for _ in range(2):
            rig.device.demote(ALL, min_age=1, bounded=True)
        assert (len(filed(rig, pages)), rig.counters().demotion_writes) == (bound, bound)
    poolfile.write_demotion_writes(rig.pool_fd, None)
    rig.device.demote(ALL, min_age=1, bounded=True)
    assert filed(rig, pages) == list(pages)


def test_a_round_that_found_too_little_does_not_keep_later_pages_from_going(rig: Rig) -> None:
    first, second = range(FIRST, FIRST + 100), range(FIRST + 100, FIRST + 200)
    for pages in first, second:
        put(rig, pages)
        assert rig.device.demote(ALL, bounded=True) > 0
        assert filed(rig, pages) == list(pages)


def test_when_the_old_pages_are_damaged_younger_ones_make_room(rig: Rig) -> None:
    old, young = range(FIRST, FIRST + 100), range(FIRST + 100, FIRST + 200)
    put(rig, old)
    for page in old:
        os.pwrite(rig.pool_fd, b"damaged", record_offset(rig.pool, page) + 12)
    age(rig, 2)
    put(rig, young)
    assert rig.device.demote(10 * PAGE, min_age=1) == 0
    assert rig.device.demote(10 * PAGE) >= 10 * PAGE
    assert filed(rig, old) == []
    assert filed(rig, young)


@contextmanager
def writes_fail_from(page: int) -> Iterator[None]:
    """The backing file cannot be written from *page* on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (page * PAGE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_could_not_be_written_is_tried_again(rig: Rig) -> None:
    pages = range(FIRST, FIRST + 100)
    put(rig, pages)
    age(rig, 2)
    with writes_fail_from(FIRST), pytest.raises(OSError, match=r"."):
        rig.device.demote(ALL, min_age=1, bounded=True)
    rig.device.demote(ALL, min_age=1, bounded=True)
    assert filed(rig, pages) == list(pages)


def test_writes_that_fail_are_not_counted(rig: Rig) -> None:
    put(rig, range(FIRST, FIRST + 400))
    rig.make_file_read_only()
    rig.reattach(clean=True)
    with pytest.raises(OSError, match=r"."):
        rig.device.demote(ALL)
    assert rig.counters().demotion_writes == 0


def test_many_threads_demote_what_is_asked_for_and_memory_returns(rig: Rig) -> None:
    pages = range(FIRST, PAGES)
    put(rig, pages)
    # Every other page is hot, so that each cold one is a write of its own.
    rig.device.begin_generation()
    for page in pages[::2]:
        rig.read(page * PAGE, PAGE)
    before = taken(rig.pool)
    freed = rig.device.demote(3 * MIB // 2, min_age=1)
    rig.device.compact(1 << 30)
    assert 3 * MIB // 2 <= freed <= 2 * MIB
    assert before - taken(rig.pool) >= 3 * MIB // 2 - 128 * PAGE
    assert filed(rig, pages[::2]) == []
    assert wrong(rig, pages) == []
    rig.reattach(clean=False)
    assert wrong(rig, pages) == []


def test_what_cannot_be_written_does_not_keep_other_pages_from_going(rig: Rig) -> None:
    last, others = range(3 * 512, 4 * 512), range(FIRST, FIRST + 100)
    put(rig, last)
    rig.device.demote(PAGE)  # demotion goes on there next time
    put(rig, others)
    with writes_fail_from(last.start):
        for _ in range(10):
            with suppress(OSError):
                rig.device.demote(10 * PAGE)
    assert rig.counters().io_errors > 0
    assert filed(rig, others)
    assert wrong(rig, last) == wrong(rig, others) == []


def test_demotion_keeps_no_buffers(rig: Rig) -> None:
    pages = range(FIRST, 2 * PAGES)
    put(rig, pages)

    def anonymous() -> int:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("Anonymous:"))

    before = anonymous()
    rig.device.demote(ALL)
    assert anonymous() - before < 512, "KiB"  # each of eight threads had 256
