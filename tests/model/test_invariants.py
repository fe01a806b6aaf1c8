# SPDX-License-Identifier: BSD-3-Clause
"""Invariants of the store that random histories would meet too seldom, one by one on the core itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.rig import PAGES, OpenDevice, Rig
from tests.support.content import PAGE, compressible, incompressible
from tests.support.harness import MIB, taken
from tests.support.index import Kind, kinds, record_offset
from tmemd.binding import _core
from tmemd.store import poolfile


def write(rig: Rig, pages: range, version: int) -> None:
    """Write pages one by one, every other one incompressible."""
    for page in pages:
        rig.write(page * PAGE, (compressible if page % 2 else incompressible)(page, version))


def wrong(rig: Rig, pages: range, version: int) -> list[int]:
    """Pages that do not hold what `write` wrote."""
    return [
        page
        for page in pages
        if rig.read(page * PAGE, PAGE) != (compressible if page % 2 else incompressible)(page, version)
    ]


def test_invariant_2_counters_of_state_are_rebuilt_and_those_of_events_kept(rig: Rig) -> None:
    write(rig, range(500), 1)
    before = rig.counters()
    rig.device.close()
    scribble(rig, ["used_bytes", "pages_in_tmem", "payload_bytes"])
    assert rig.counters().pages_in_tmem != before.pages_in_tmem
    rig.reattach(clean=True)
    after = rig.counters()
    assert (after.used_bytes, after.pages_in_tmem, after.payload_bytes) == (
        taken(rig.pool), before.pages_in_tmem, before.payload_bytes,
    )  # fmt: skip
    assert (after.puts, after.puts_raw) == (before.puts, before.puts_raw)


def scribble(rig: Rig, names: list[str]) -> None:
    """Write nonsense over some counters."""
    for name in names:
        at = poolfile.COUNTERS_OFFSET + 8 * poolfile.Counters.__struct_fields__.index(name)
        os.pwrite(rig.pool_fd, b"\x77" * 4 + bytes(4), at)


def allocate(fd: int, offset: int, length: int) -> None:
    """Take memory without writing there, as a process does that is killed before it can."""
    os.posix_fallocate(fd, offset, length)


def litter(fd: int, offset: int, length: int) -> None:
    """Write over all that is a hole, as a process does that is killed before the index says what it wrote."""
    for at in range(offset, offset + length, PAGE):
        if os.lseek(fd, at, os.SEEK_HOLE) == at:
            os.pwrite(fd, b"x" * PAGE, at)


@pytest.mark.parametrize("leave", [allocate, litter])
def test_invariant_2_memory_no_live_word_points_at_is_given_back(
    rig: Rig, leave: Callable[[int, int, int], None]
) -> None:
    write(rig, range(100), 1)
    rig.device.compact(1 << 30)
    rig.device.close()
    before = taken(rig.pool)
    leave(rig.pool_fd, rig.identity.data_offset + rig.identity.data_bytes // 2, 3 * MIB)
    leave(rig.pool_fd, rig.identity.data_offset, MIB)
    assert taken(rig.pool) > before + 3 * MIB
    rig.reattach(clean=True)
    assert taken(rig.pool) <= before
    assert rig.counters().used_bytes == taken(rig.pool)
    assert wrong(rig, range(100), 1) == []


def test_invariant_2_an_index_that_contradicts_itself_is_refused(rig: Rig) -> None:
    write(rig, range(1, 10), 1)
    rig.device.close()
    word = os.pread(rig.pool_fd, 8, rig.identity.index_offset + 8 * 3)
    os.pwrite(rig.pool_fd, word, rig.identity.index_offset + 8 * 5)
    with pytest.raises((ValueError, OSError), match="page"):
        rig.reattach(clean=True)


def test_invariant_2_a_record_where_no_slot_begins_is_refused(rig: Rig) -> None:
    write(rig, range(3, 4), 1)
    rig.device.close()
    at = rig.identity.index_offset + 8 * 3
    word = int.from_bytes(os.pread(rig.pool_fd, 8, at), "little")
    os.pwrite(rig.pool_fd, (word + (1 << 28)).to_bytes(8, "little"), at)  # 16 bytes further
    with pytest.raises((ValueError, OSError), match="page 3"):
        rig.reattach(clean=True)


def test_invariant_4_reading_and_trimming_what_was_never_written_takes_no_memory(rig: Rig) -> None:
    before = taken(rig.pool)
    assert rig.read(0, PAGES * PAGE) == bytes(PAGES * PAGE)
    _core.trim(rig.device, PAGES * PAGE, 0, 0)
    _core.extents(rig.device, PAGES * PAGE, 0, 0)
    rig.device.demote(MIB)
    rig.device.compact(1000)
    assert taken(rig.pool) <= before + PAGE  # page 0 is always written, which takes its page of the index


def test_invariant_5_a_get_changes_neither_content_nor_place_nor_counts(rig: Rig) -> None:
    write(rig, range(200), 1)
    places = [record_offset(rig.pool, page) for page in range(200)]
    before = rig.counters()
    for _ in range(3):
        assert wrong(rig, range(200), 1) == []
    assert [record_offset(rig.pool, page) for page in range(200)] == places
    after = rig.counters()
    assert without_reads(after) == without_reads(before)
    assert after.gets == before.gets + 3 * 200


def without_reads(counters: poolfile.Counters) -> dict[str, int]:
    """All but the counters that reading may change."""
    fields = {name: getattr(counters, name) for name in poolfile.Counters.__struct_fields__}
    return {name: value for name, value in fields.items() if name not in {"gets", "reads"}}


def test_invariant_8_a_failed_spill_leaves_the_old_pages_and_a_consistent_index(rig: Rig) -> None:
    write(rig, range(1, 500), 1)
    rig.make_file_read_only()
    rig.reattach(clean=True)
    rig.frozen(True)
    for page in range(1, 500, 50):
        with pytest.raises(OSError, match=r"Errno 5\b"):
            rig.write(page * PAGE, b"".join(incompressible(n, 2) for n in range(page, page + 64)))
    assert wrong(rig, range(1, 500), 1) == []
    assert rig.read(600 * PAGE, PAGE) == bytes(PAGE)
    assert rig.counters().io_errors > 0
    rig.reattach(clean=False)
    assert wrong(rig, range(1, 500), 1) == []


def test_invariant_8_a_failed_demotion_or_drain_loses_nothing(rig: Rig) -> None:
    # Pages that are not written through anyway.
    write(rig, range(200, 500), 1)
    rig.make_file_read_only()
    rig.reattach(clean=True)
    with pytest.raises(OSError, match=r"."):
        rig.device.drain()
    assert rig.counters().regions_set > 0
    assert wrong(rig, range(200, 500), 1) == []
    assert Kind.FILE not in kinds(rig.pool)[200:]


def test_a_limit_that_does_not_hold_the_index_is_refused(core_device: OpenDevice) -> None:
    with pytest.raises(OSError, match="memory cannot be found or allocated"):
        core_device(64 * MIB, 64 << 10)


def test_a_damaged_last_page_that_ends_early_can_be_written(core_device: OpenDevice, disk: Path) -> None:
    end = 16 * PAGE
    rig = core_device(end + 512, 32 * MIB)
    rig.frozen(True)
    rig.write(end, b"a" * 512)
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", end)
    with pytest.raises(OSError, match=r"."):
        rig.read(end, 512)
    with pytest.raises(OSError, match=r"."):
        rig.write(end, b"b" * 511)
    rig.write(end, b"c" * 512)
    assert rig.read(end, 512) == b"c" * 512


def test_the_coldest_pages_are_demoted_first(rig: Rig) -> None:
    write(rig, range(1, 401), 1)
    for _ in range(3):
        rig.device.begin_generation()
        assert wrong(rig, range(200, 401), 1) == []
    rig.device.demote(100 * PAGE)
    where = kinds(rig.pool)
    assert where[1:200].count(Kind.FILE) >= 90
    assert where[200:401].count(Kind.FILE) == 0


@pytest.mark.parametrize("written", [0, 1, 300, PAGES])
def test_what_is_freeable_is_what_demotion_gives_back(rig: Rig, written: int) -> None:
    write(rig, range(written), 1)
    before = taken(rig.pool)
    freeable = poolfile.freeable(rig.identity, rig.counters())
    rig.device.demote(1 << 40)
    rig.device.compact(1 << 30)
    # A page of the header may be a hole.
    assert before - taken(rig.pool) - freeable in (0, PAGE if written else 0)
    assert poolfile.freeable(rig.identity, rig.counters()) == 0


def test_a_pool_without_a_file_has_nothing_freeable(core_device: OpenDevice) -> None:
    rig = core_device(PAGES * PAGE, 8 * MIB, disk=None)
    write(rig, range(300), 1)
    assert poolfile.freeable(rig.identity, rig.counters()) == 0


def test_compaction_gives_back_what_random_overwrites_left_scattered(rig: Rig) -> None:
    write(rig, range(1, PAGES), 1)
    for page in range(1, PAGES):
        if page % 4:
            _core.trim(rig.device, PAGE, page * PAGE, 0)
    rig.device.compact(1 << 30)
    now = rig.counters()
    assert now.used_bytes < now.payload_bytes * 1.1 + 256 * 1024
    assert [page for page in range(4, PAGES, 4) if wrong(rig, range(page, page + 1), 1)] == []


def test_the_target_of_a_device_without_a_file_never_falls_below_its_use(core_device: OpenDevice) -> None:
    rig = core_device(PAGES * PAGE, 8 * MIB, disk=None)
    write(rig, range(300), 1)
    rig.target(rig.minimum)
    with pytest.raises(OSError, match=r"."):
        write(rig, range(300, 900), 1)
    assert wrong(rig, range(300), 1) == []


def test_freezing_refuses_puts_and_overwrites_spill(rig: Rig) -> None:
    write(rig, range(1, 50), 1)
    rig.frozen(True)
    write(rig, range(1, 100), 2)
    now = rig.counters()
    assert (now.pages_in_tmem, now.spills) == (0, 99)
    rig.frozen(False)
    write(rig, range(1, 50), 3)
    assert rig.counters().pages_in_tmem == 49
    assert wrong(rig, range(50, 100), 2) + wrong(rig, range(1, 50), 3) == []


def test_a_control_word_torn_in_the_middle_is_ignored(rig: Rig) -> None:
    os.pwrite(rig.pool_fd, (0).to_bytes(8, "little") * 2, poolfile.CONTROL_OFFSET)
    os.pwrite(rig.pool_fd, (1).to_bytes(8, "little") * 2, poolfile.CONTROL_OFFSET + 16)
    write(rig, range(1, 50), 1)
    assert rig.counters().puts_refused == 0


def test_zero_and_same_filled_pages_cost_next_to_nothing(rig: Rig) -> None:
    rig.write(PAGE, bytes(100 * PAGE))
    empty = rig.counters()
    assert (empty.puts_zero, empty.pages_in_tmem) == (100, 0)
    rig.write(PAGE, b"12345678" * (512 * 400))
    now = rig.counters()
    assert (now.puts_same, now.pages_in_tmem, now.payload_bytes) == (400, 400, 3200)
    assert now.used_bytes - empty.used_bytes <= 400 * 32 + 2 * PAGE
    assert rig.read(PAGE, 400 * PAGE) == b"12345678" * (512 * 400)


def test_pages_in_tmem_are_put_again_however_many_others_are_refused(rig: Rig) -> None:
    stay, refused = range(200), range(PAGES // 2, PAGES // 2 + 500)
    for page in range(400):
        rig.write(page * PAGE, compressible(0, 1))
    rig.target(rig.counters().used_bytes)
    for page in range(200, 400, 40):
        _core.trim(rig.device, PAGE, page * PAGE, 0)  # leaves slots of that size
    for page in refused:
        rig.write(page * PAGE, incompressible(page, 1))
    assert rig.counters().spills == len(refused)
    for page in stay:
        rig.write(page * PAGE, compressible(0, 1))
    assert rig.counters().spills == len(refused)
