# SPDX-License-Identifier: BSD-3-Clause
"""The statistics page: latencies, and events and contents by age."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.model.rig import OpenDevice, Rig
from tests.support.content import PAGE, compressible, incompressible
from tests.support.harness import MIB, taken
from tests.support.index import BLOCK, Kind, words
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.poolfile import GENERATIONS, LATENCY_BOUNDS_NS, Ages, Histogram, Latencies

ANCIENT = GENERATIONS - 1
FILE, LOST = 1, 2  # states that blocks have after a pool was lost


def latencies(rig: Rig) -> Latencies:
    """The histograms."""
    return poolfile.Snapshot().take(rig.pool_fd, rig.pool).latencies()


def ages(rig: Rig) -> Ages:
    """What is known by age."""
    return poolfile.Snapshot().take(rig.pool_fd, rig.pool).ages()


def at(*counts: tuple[int, int]) -> tuple[int, ...]:
    """A table by age: (age, how many) where it is not 0."""
    return tuple(dict(counts).get(age, 0) for age in range(GENERATIONS))


def write(rig: Rig, pages: range, version: int = 1) -> None:
    """Write compressible pages in one request."""
    rig.write(pages.start * PAGE, b"".join(compressible(page, version) for page in pages))


def write_to_file(rig: Rig, pages: range) -> None:
    """The same, but their put is refused."""
    rig.frozen(True)
    write(rig, pages)
    rig.frozen(False)


def age(rig: Rig, times: int) -> None:
    """Let generations pass."""
    for _ in range(times):
        rig.device.begin_generation()


def test_each_stored_put_get_spilled_run_and_run_read_from_the_file_has_its_latency(rig: Rig) -> None:
    write(rig, range(200, 300))
    rig.write(300 * PAGE, bytes(10 * PAGE))
    rig.read(200 * PAGE, 50 * PAGE)
    write_to_file(rig, range(400, 420))
    write_to_file(rig, range(550, 570))
    rig.read(400 * PAGE, 20 * PAGE)
    rig.read(555 * PAGE + 5, 10)
    now, seen = rig.counters(), latencies(rig)
    assert (seen.put.count, seen.get.count) == (now.puts - now.puts_refused, now.gets) == (110, 50)
    assert (seen.spill.count, seen.file_read.count) == (2, 2)


def test_buckets_bound_the_sum_of_what_is_in_them(rig: Rig) -> None:
    write(rig, range(200, 600))
    for page in range(200, 600):
        rig.read(page * PAGE, PAGE)
    for first in range(600, 890, 10):
        write_to_file(rig, range(first, first + 10))
        rig.read(first * PAGE, 10 * PAGE)
    for histogram in (latencies(rig).put, latencies(rig).get, latencies(rig).spill, latencies(rig).file_read):
        assert histogram.count >= 29
        low, high = bounds(histogram)
        assert low <= histogram.sum_ns <= high


def bounds(histogram: Histogram) -> tuple[float, float]:
    """The least and the greatest sum that these counts can have."""
    edges = (0, *LATENCY_BOUNDS_NS, float("inf"))
    used = [(edges[i], edges[i + 1], count) for i, count in enumerate(histogram.counts) if count]
    return sum(low * count for low, _, count in used), sum(high * count for _, high, count in used)


@pytest.mark.parametrize("times", [0, 3, ANCIENT - 1, ANCIENT, 40])
def test_gets_are_counted_by_the_age_before(rig: Rig, times: int) -> None:
    write(rig, range(200, 210))
    age(rig, times)
    rig.read(200 * PAGE, 10 * PAGE)
    rig.read(200 * PAGE, PAGE)
    expected = at((0, 11)) if times == 0 else at((min(times, ANCIENT), 10), (0, 1))
    assert ages(rig).gets == expected


@pytest.mark.parametrize("times", [0, 3, ANCIENT - 1, ANCIENT, 40])
def test_file_reads_are_counted_by_the_age_before_and_refresh_it(rig: Rig, times: int) -> None:
    write_to_file(rig, range(200, 210))
    rig.frozen(True)  # nothing is promoted
    age(rig, times)
    rig.read(200 * PAGE, 10 * PAGE)
    rig.read(205 * PAGE + 7, 8)
    expected = at((0, 11)) if times == 0 else at((min(times, ANCIENT), 10), (0, 1))
    assert ages(rig).file_reads == expected
    assert ages(rig).gets == at()


def test_a_page_that_is_read_again_for_its_checksum_is_counted_once(rig: Rig) -> None:
    write_to_file(rig, range(200, 210))
    assert rig.disk is not None
    with rig.disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"damaged", 205 * PAGE)
    before = rig.counters().file_reads
    with pytest.raises(OSError, match=r"."):
        rig.read(205 * PAGE, PAGE)
    assert rig.counters().file_reads == before + 1
    assert sum(ages(rig).file_reads) == 1


def test_a_page_read_from_the_file_reads_the_same_again_after_it_was_refreshed(rig: Rig) -> None:
    write_to_file(rig, range(200, 210))
    rig.frozen(True)
    for _ in range(2 * GENERATIONS):
        age(rig, 1)
        for page in range(200, 210):
            assert rig.read(page * PAGE, PAGE) == compressible(page, 1)
    assert rig.counters().bad_checksums == 0
    assert [word.kind for word in words(rig.pool)[200:210]] == [Kind.FILE] * 10


@pytest.mark.parametrize("where", [write, write_to_file], ids=["tmem", "file"])
def test_what_is_overwritten_zeroed_or_trimmed_is_counted_as_freed_by_its_age(rig: Rig, where: object) -> None:
    assert callable(where)
    where(rig, range(200, 240))
    assert ages(rig).freed == at()
    age(rig, 2)
    write(rig, range(200, 203))
    assert ages(rig).freed == at((2, 3))
    write_to_file(rig, range(203, 208))
    assert ages(rig).freed == at((2, 8))
    _core.trim(rig.device, 7 * PAGE, 208 * PAGE, 0)
    assert ages(rig).freed == at((2, 15))
    _core.zero(rig.device, 2 * PAGE, 215 * PAGE, 0)
    rig.write(217 * PAGE, bytes(PAGE))
    _core.trim(rig.device, 40 * PAGE, 900 * PAGE, 0)  # nothing was there
    assert ages(rig).freed == at((2, 18))


def test_a_trimmed_block_is_freed_page_by_page(core_device: OpenDevice) -> None:
    rig = core_device(4096 * PAGE, 64 * MIB)  # its second block holds nothing that is written through
    for first in range(1536, 2048, 64):
        write(rig, range(first, first + 64))
    age(rig, 4)
    write_to_file(rig, range(1536, 1546))
    assert ages(rig).freed == at((4, 10))
    _core.trim(rig.device, 512 * PAGE, 1536 * PAGE, 0)
    assert ages(rig).freed == at((0, 10), (4, 512))


def test_what_is_demoted_or_moved_is_not_freed(rig: Rig) -> None:
    write(rig, range(200, 400))
    age(rig, 1)
    rig.device.demote(64 << 10)
    _core.trim(rig.device, 100 * PAGE, 300 * PAGE, 0)
    rig.device.compact(1 << 30)
    rig.device.drain()
    assert rig.counters().demotions == 100
    assert ages(rig).freed == at((1, 100))


def test_a_page_written_through_is_freed_once(rig: Rig) -> None:
    write(rig, range(5, 6))
    age(rig, 1)
    write(rig, range(5, 6), 2)
    _core.trim(rig.device, PAGE, 5 * PAGE, 0)
    assert ages(rig).freed == at((1, 1), (0, 1))


def published(rig: Rig) -> Ages:
    """The ages as published now."""
    rig.device.publish_ages()
    return ages(rig)


def test_published_ages_say_what_lies_where(rig: Rig) -> None:
    before = ages(rig)
    assert (before.stored_bytes, before.raw_bytes, before.in_file_pages, before.published) == (at(), at(), at(), 0)
    write(rig, range(200, 250))
    rig.write(250 * PAGE, b"".join(incompressible(page, 1) for page in range(250, 260)))
    rig.write(260 * PAGE, b"same" * (10 * PAGE // 4))
    age(rig, 5)
    write_to_file(rig, range(300, 330))
    age(rig, 3)
    write(rig, range(400, 420))
    age(rig, 9)
    rig.read(200 * PAGE, 10 * PAGE)
    index = words(rig.pool)
    sizes = [word.slot if word.kind is Kind.TMEM else 0 for word in index]
    seen = published(rig)
    assert seen.published == 1
    assert seen.stored_bytes == at((0, sum(sizes[200:210])), (9, sum(sizes[400:420])), (15, sum(sizes[210:270])))
    assert seen.raw_bytes == at((15, sum(sizes[250:260])))
    assert seen.in_file_pages == at((12, 30))


def test_published_ages_replace_those_before(rig: Rig) -> None:
    write(rig, range(200, 250))
    published(rig)
    _core.trim(rig.device, 50 * PAGE, 200 * PAGE, 0)
    assert (published(rig).stored_bytes, ages(rig).published) == (at(), 2)


@pytest.mark.parametrize("state", [FILE, LOST], ids=["file", "lost"])
def test_after_a_pool_was_lost_each_page_in_the_file_is_counted_once(core_device: OpenDevice, state: int) -> None:
    rig = core_device(8 * BLOCK * PAGE, 64 * MIB)
    os.pwrite(rig.pool_fd, bytes([state] * 8), poolfile.STATES_OFFSET)
    rig.reattach(clean=True)
    _core.trim(rig.device, BLOCK * PAGE, 3 * BLOCK * PAGE, 0)
    for block in {*range(8)} - {3}:
        write(rig, range(block * BLOCK + 300, block * BLOCK + 301))
    expected = at((ANCIENT, rig.counters().pages_in_file))
    assert rig.counters().pages_in_file > 0
    assert published(rig).in_file_pages == expected
    rig.reattach(clean=False)
    assert published(rig).in_file_pages == expected


def test_neighbours_without_a_checksum_are_one_read(core_device: OpenDevice) -> None:
    rig = core_device(8 * BLOCK * PAGE, 64 * MIB)
    os.pwrite(rig.pool_fd, bytes([FILE] * 8), poolfile.STATES_OFFSET)
    rig.reattach(clean=True)
    rig.read(300 * PAGE, 8 * PAGE)
    assert latencies(rig).file_read.count == 1


@pytest.mark.parametrize("clean", [True, False])
def test_ages_and_statistics_outlive_the_process(rig: Rig, clean: bool) -> None:
    write(rig, range(200, 250))
    age(rig, 6)
    write(rig, range(300, 350))
    age(rig, 3)
    before, took = published(rig), latencies(rig)
    rig.reattach(clean=clean)
    assert (ages(rig), latencies(rig)) == (before, took)
    assert published(rig).stored_bytes == before.stored_bytes


def test_a_pool_made_without_statistics_gets_them(rig: Rig) -> None:
    write(rig, range(200, 250))
    rig.device.close()
    hole = f"--offset={poolfile.STATISTICS_OFFSET}", f"--length={PAGE}"
    subprocess.run(["fallocate", "--punch-hole", *hole, rig.pool], check=True)
    assert os.lseek(rig.pool_fd, poolfile.STATISTICS_OFFSET, os.SEEK_DATA) > poolfile.STATISTICS_OFFSET
    rig.reattach(clean=True)
    assert rig.counters().used_bytes == taken(rig.pool)
    rig.read(200 * PAGE, 50 * PAGE)
    assert latencies(rig).get.count == 50
    assert sum(ages(rig).gets) == 50
