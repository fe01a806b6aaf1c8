# SPDX-License-Identifier: BSD-3-Clause
"""Pages that come back from the file soon are put again."""

from __future__ import annotations

import os

import pytest

from tests.model.rig import OpenDevice, Rig
from tests.support.content import PAGE, compressible
from tests.support.harness import MIB
from tests.support.index import Kind, kinds, words
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.check import check_pool
from tmemd.store.poolindex import State

PAGES = 4096
PROMOTE_AGE = 6
PROMOTE_RUN = 8
IN_FILE = range(600, 700)  # none of them is written through


@pytest.fixture
def rig(core_device: OpenDevice) -> Rig:
    """A device with room for all its pages, some of which are in the file because their put was refused."""
    rig = core_device(PAGES * PAGE, 64 * MIB)
    spill(rig, IN_FILE, 1)
    return rig


def spill(rig: Rig, pages: range, version: int) -> None:
    """Write pages while puts are refused."""
    rig.frozen(True)
    for page in pages:
        rig.write(page * PAGE, compressible(page, version))
    rig.frozen(False)
    assert set(kinds(rig.pool)[pages.start : pages.stop]) == {Kind.FILE}


def read(rig: Rig, page: int, version: int = 1) -> Kind:
    """Read a page, which must be right; returns where it is afterwards."""
    assert rig.read(page * PAGE, PAGE) == compressible(page, version)
    return kinds(rig.pool)[page]


def test_a_page_that_comes_back_soon_is_in_tmem_afterwards(rig: Rig) -> None:
    before = rig.counters()
    assert read(rig, 600) is Kind.TMEM
    assert read(rig, 600) is Kind.TMEM
    after = rig.counters()
    assert (after.promotions, after.file_reads - before.file_reads, after.gets - before.gets) == (1, 1, 1)
    assert (after.puts, after.puts_raw, after.invalidates) == (before.puts, before.puts_raw, before.invalidates)
    assert sum(poolfile.Snapshot().take(rig.pool_fd, rig.pool).ages().freed) == 0
    assert check_pool(rig.pool).problems == []


@pytest.mark.parametrize("times", [0, 1, PROMOTE_AGE - 1, PROMOTE_AGE, 14, 15, 40])
def test_only_a_page_that_was_used_lately_is_promoted(rig: Rig, times: int) -> None:
    for _ in range(times):
        rig.device.begin_generation()
    assert read(rig, 600) is (Kind.TMEM if times < PROMOTE_AGE else Kind.FILE)
    assert read(rig, 600) is Kind.TMEM  # now it was
    assert rig.counters().promotions == 1


def test_demoting_a_promoted_page_again_writes_nothing(rig: Rig) -> None:
    assert read(rig, 600) is Kind.TMEM
    rig.make_file_read_only()
    rig.reattach(clean=True)
    rig.device.demote(1)
    assert kinds(rig.pool)[600] is Kind.FILE
    assert rig.read(600 * PAGE, PAGE) == compressible(600, 1)
    assert rig.counters().io_errors == 0


@pytest.mark.parametrize("drain", [False, True])
def test_a_promoted_page_that_is_overwritten_is_not_taken_from_the_file(rig: Rig, drain: bool) -> None:
    assert read(rig, 600) is Kind.TMEM
    rig.write(600 * PAGE, compressible(600, 2))
    if drain:
        rig.device.drain()
    else:
        rig.device.demote(1)
    assert kinds(rig.pool)[600] is Kind.FILE
    assert rig.read(600 * PAGE, PAGE) == compressible(600, 2)


def test_a_promoted_page_is_the_same_after_the_process_was_killed(rig: Rig) -> None:
    for page in IN_FILE:
        read(rig, page)
    rig.reattach(clean=False)
    assert {read(rig, page) for page in IN_FILE} == {Kind.TMEM}


def test_a_frozen_pool_takes_nothing_back(rig: Rig) -> None:
    rig.frozen(True)
    assert read(rig, 600) is Kind.FILE
    rig.frozen(False)
    assert read(rig, 600) is Kind.TMEM


def test_promotion_leaves_room_for_writes(rig: Rig) -> None:
    for page in range(1100, 3500):
        rig.write(page * PAGE, compressible(page, 1))
    used = rig.counters().used_bytes
    rig.target(used)
    assert read(rig, 600) is Kind.FILE
    rig.target(used + used // 512)
    assert read(rig, 600) is Kind.FILE
    rig.target(used + used // 64)
    assert read(rig, 600) is Kind.TMEM


@pytest.mark.parametrize(("n", "kind"), [(PROMOTE_RUN, Kind.TMEM), (PROMOTE_RUN + 1, Kind.FILE), (64, Kind.FILE)])
def test_reads_of_many_pages_promote_nothing(rig: Rig, n: int, kind: Kind) -> None:
    assert rig.read(600 * PAGE, n * PAGE) == b"".join(compressible(page, 1) for page in range(600, 600 + n))
    assert kinds(rig.pool)[600:700] == [kind] * n + [Kind.FILE] * (100 - n)


def test_of_a_run_only_pages_that_were_used_lately_are_promoted(rig: Rig) -> None:
    for _ in range(PROMOTE_AGE):
        rig.device.begin_generation()
    spill(rig, range(602, 604), 1)
    rig.write(605 * PAGE, compressible(605, 1))
    rig.read(600 * PAGE, 8 * PAGE)
    in_tmem = [page for page, word in enumerate(words(rig.pool)) if word.kind is Kind.TMEM]
    assert in_tmem == [602, 603, 605]
    assert rig.counters().promotions == 2


def test_part_of_a_page_is_enough(rig: Rig) -> None:
    assert rig.read(600 * PAGE + 100, 50) == compressible(600, 1)[100:150]
    assert read(rig, 600) is Kind.TMEM


def test_a_damaged_page_is_an_error_and_stays_where_it_is(rig: Rig) -> None:
    assert rig.disk is not None
    with rig.disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 600 * PAGE)
    for _ in range(2):
        with pytest.raises(OSError, match=r"."):
            rig.read(600 * PAGE, PAGE)
    assert kinds(rig.pool)[600] is Kind.FILE
    assert rig.counters().promotions == 0


def test_what_has_no_checksum_is_promoted_when_it_is_read_again_and_has_one_then(rig: Rig) -> None:
    rig.device.drain()
    rig.device.close()
    os.pwrite(rig.pool_fd, bytes([State.FILE]), poolfile.STATES_OFFSET + 600 // 512)
    rig.reattach(clean=True)
    _core.trim(rig.device, PAGE, 700 * PAGE, 0)  # brings the block into the index
    assert [read(rig, 600) for _ in range(3)] == [Kind.FILE, Kind.TMEM, Kind.TMEM]
    assert rig.counters().promotions == 1
    rig.device.drain()
    assert rig.disk is not None
    with rig.disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 600 * PAGE)
    with pytest.raises(OSError, match=r"Errno 5\b"):
        rig.read(600 * PAGE, PAGE)


def test_a_cache_request_is_counted_as_promotions_not_as_puts(rig: Rig) -> None:
    before = rig.counters()
    for _ in range(PROMOTE_AGE):
        rig.device.begin_generation()
    _core.cache(rig.device, 100 * PAGE, 600 * PAGE, 0)
    after = rig.counters()
    assert (after.promotions, after.puts) == (100, before.puts)
    assert {read(rig, page) for page in IN_FILE} == {Kind.TMEM}


def test_a_cache_request_brings_in_no_page_more(rig: Rig) -> None:
    _core.cache(rig.device, PAGE, 600 * PAGE, 0)
    assert [kinds(rig.pool)[page] for page in (600, 601)] == [Kind.TMEM, Kind.FILE]


def test_a_page_that_the_file_has_no_more_is_an_error(rig: Rig) -> None:
    assert rig.disk is not None
    os.truncate(rig.disk, 600 * PAGE)
    with pytest.raises(OSError, match=r"Errno 5\b"):
        rig.read(600 * PAGE, PAGE)


def compression(rig: Rig, on: bool) -> None:
    """Switch compression."""
    poolfile.write_compression(rig.pool_fd, on)


def encodings(rig: Rig, pages: range) -> list[int]:
    """How pages in tmem are encoded: 0 raw, 1 LZ4, 2 one word."""
    return [word.value >> 3 & 3 for word in words(rig.pool)[pages.start : pages.stop]]


def test_pages_are_compressed_unless_told_otherwise(rig: Rig) -> None:
    compression(rig, False)
    rig.write(200 * PAGE, compressible(200, 1) + b"same" * (PAGE // 4) + bytes(PAGE))
    read(rig, 600)  # a promoted one as well
    compression(rig, True)
    rig.write(210 * PAGE, compressible(210, 1))
    os.pwrite(rig.pool_fd, bytes(16), poolfile.CONTROL_OFFSET + 48)  # nobody said anything, or it is torn
    rig.write(211 * PAGE, compressible(211, 1))
    assert encodings(rig, range(200, 202)) == [0, 2]
    assert kinds(rig.pool)[202] is Kind.NOWHERE
    assert encodings(rig, range(600, 601)) == [0]
    assert encodings(rig, range(210, 212)) == [1, 1]
    assert (rig.counters().puts_raw, rig.counters().puts_same) == (1, 1)
    assert rig.read(200 * PAGE, 3 * PAGE) == compressible(200, 1) + b"same" * (PAGE // 4) + bytes(PAGE)
    assert read(rig, 600) is Kind.TMEM
    assert check_pool(rig.pool).problems == []
