# SPDX-License-Identifier: BSD-3-Clause
"""A served device's maintenance makes room for pages to come; each tick is made by hand, and so is each generation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, counters, taken, wait_until, waiting
from tests.support.index import Kind, kinds
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.maintenance import IDLE_AFTER, TICK, TICK_WHILE_IDLE
from tmemd.device.serve import ServedDevice, open_device
from tmemd.store import poolfile, requests
from tmemd.store.requests import Choice, Request

LIMIT = 3 * MIB
COLD = range(1100, 4096)  # more than the limit has room for
HOT = range(5000, 5700)

Open = Callable[..., ServedDevice]


@pytest.fixture
def opened(pools: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens devices whose maintenance the test does: opened(watermark=..., backing=...). They do not age alone."""
    monkeypatch.setattr("tmemd.device.maintenance.GENERATION_SECONDS", math.inf)
    with ExitStack() as stack:

        def opened(backing: Path | None = disk, watermark: int = 10, prefetch: str = "no") -> ServedDevice:
            config = DeviceConfig("x", 8192 * PAGE, backing, LIMIT, pools, watermark=watermark, prefetch=prefetch)
            served = open_device(config)
            stack.callback(served.close)
            return served

        yield opened


def write(served: ServedDevice, pages: range) -> None:
    """Write pages, each of about a third of its size when compressed, with a round of maintenance now and then."""
    for page in pages:
        _core.pwrite(served.core, compressible(page, 1), page * PAGE, 0)
        if page % 20 == 0:
            rounds(served, 1)
    rounds(served, 1)


def rounds(served: ServedDevice, n: int, now: float | None = None) -> None:
    """Let the maintenance do what it has to do."""
    for _ in range(n):
        while served.maintenance.tick(time.monotonic() if now is None else now) == 0:
            pass


def grow_old(served: ServedDevice, generations: int = 3) -> None:
    """Time passes, and nothing happens."""
    for _ in range(generations):
        served.core.begin_generation()


def in_tmem(served: ServedDevice, pages: range) -> int:
    """How many of these pages are in RAM."""
    where = kinds(served.pool_path)
    return sum(where[page] is Kind.TMEM for page in pages)


def fill(served: ServedDevice) -> None:
    """Write cold pages until there is no room for more."""
    write(served, COLD)
    assert counters(served.pool_path).puts_refused > 0


def test_cold_pages_make_room_for_hot_ones(opened: Open) -> None:
    served = opened()
    fill(served)
    grow_old(served)
    write(served, HOT)
    write(served, HOT)
    assert in_tmem(served, HOT) == len(HOT)
    assert in_tmem(served, COLD) > 0, "no more than was needed"
    assert taken(served.pool_path) <= LIMIT
    for page in (*COLD, *HOT):
        buffer = bytearray(PAGE)
        _core.pread(served.core, buffer, page * PAGE, 0)
        assert buffer == compressible(page, 1)


def test_without_a_watermark_what_came_first_stays(opened: Open) -> None:
    served = opened(watermark=0)
    fill(served)
    grow_old(served)
    write(served, HOT)
    write(served, HOT)
    assert in_tmem(served, HOT) < len(HOT) / 10
    assert counters(served.pool_path).demotions == 0


def test_pages_no_older_than_those_that_come_in_stay(opened: Open) -> None:
    served = opened()
    fill(served)
    write(served, HOT)
    assert counters(served.pool_path).demotions == 0


def test_nothing_is_demoted_while_the_guest_does_nothing_or_only_reads(opened: Open) -> None:
    served = opened()
    fill(served)
    grow_old(served, 8)
    rounds(served, 20)
    for page in COLD[::5]:
        _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
        rounds(served, 1)
    assert counters(served.pool_path).demotions == 0


def test_room_is_made_for_pages_that_come_back_soon(opened: Open) -> None:
    served = opened()
    fill(served)
    grow_old(served, 8)
    with served.pool_path.open("r+b") as pool:
        poolfile.write_frozen(pool.fileno(), True)
        write(served, HOT)
        poolfile.write_frozen(pool.fileno(), False)
    assert in_tmem(served, HOT) == 0
    for _ in range(3):
        for page in HOT:
            _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
            if page % 20 == 0:
                rounds(served, 1)
    assert in_tmem(served, HOT) == len(HOT)


def test_room_is_made_for_pages_that_are_fetched_ahead(opened: Open) -> None:
    served = opened(prefetch="yes")
    fill(served)
    grow_old(served, 8)
    served.core.demote(MIB // 4)
    served.core.compact(1 << 30)
    where = kinds(served.pool_path)
    in_file = [page for page in COLD if where[page] is Kind.FILE]
    ahead = in_file[-1000:]
    for page in ahead:
        _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
        if page % 20 == 0:
            rounds(served, 1)
    assert counters(served.pool_path).prefetch_hits > len(ahead) * 3 / 4
    assert taken(served.pool_path) <= LIMIT


def test_a_frozen_pool_makes_no_room(opened: Open) -> None:
    served = opened()
    fill(served)
    grow_old(served)
    with served.pool_path.open("r+b") as pool:
        poolfile.write_frozen(pool.fileno(), True)
    write(served, HOT)
    assert counters(served.pool_path).demotions == 0


def test_a_device_without_a_file_has_nowhere_to_make_room_to(opened: Open) -> None:
    served = opened(backing=None)
    with pytest.raises(OSError, match=r"Errno 5\b"):
        write(served, COLD)
    grow_old(served)
    rounds(served, 3)
    with pytest.raises(OSError, match=r"Errno 5\b"):
        write(served, HOT)
    assert counters(served.pool_path).demotions == 0


def test_a_device_without_a_file_keeps_what_it_has_whatever_its_target(opened: Open) -> None:
    served = opened(backing=None)
    write(served, range(1100, 1900))
    before = counters(served.pool_path)
    with served.pool_path.open("r+b") as pool:
        poolfile.write_target(pool.fileno(), before.minimum_bytes)
    assert before.used_bytes > before.minimum_bytes
    assert [served.maintenance.tick(time.monotonic()) for _ in range(3)] == [TICK] * 3
    assert counters(served.pool_path).used_bytes == before.used_bytes


def test_room_is_made_within_the_bound_on_writes(opened: Open) -> None:
    served = opened()
    fill(served)
    grow_old(served)
    with served.pool_path.open("r+b") as pool:
        poolfile.write_demotion_writes(pool.fileno(), 100)
        write(served, HOT)
        assert counters(served.pool_path).demotion_writes == 100
        poolfile.write_demotion_writes(pool.fileno(), None)
    write(served, HOT)
    assert counters(served.pool_path).demotion_writes > 100


def test_a_falling_target_is_met_within_the_bound_and_a_request_is_not_bound(opened: Open) -> None:
    served = opened()
    fill(served)
    with served.pool_path.open("r+b") as pool:
        poolfile.write_demotion_writes(pool.fileno(), 100)
        poolfile.write_target(pool.fileno(), LIMIT // 2)
        rounds(served, 3)
        assert counters(served.pool_path).demotion_writes == 100
        assert counters(served.pool_path).used_bytes > LIMIT // 2
        requests.ask(pool.fileno(), Request.DEMOTE, MIB)
        rounds(served, 1)
        assert counters(served.pool_path).demotion_writes > 100
        poolfile.write_demotion_writes(pool.fileno(), None)
        rounds(served, 3)
    assert taken(served.pool_path) == counters(served.pool_path).used_bytes <= LIMIT // 2


def test_a_request_says_which_pages_go(opened: Open) -> None:
    served = opened()
    write(served, range(1100, 1300))
    grow_old(served, 4)
    write(served, range(1300, 1500))
    with served.pool_path.open("r+b") as pool:
        requests.ask(pool.fileno(), Request.DEMOTE, LIMIT, Choice(raw_only=True))
        rounds(served, 1)
        assert counters(served.pool_path).demotions == 0
        requests.ask(pool.fileno(), Request.DEMOTE, LIMIT, Choice(min_age=4))
        rounds(served, 1)
    assert (in_tmem(served, range(1100, 1300)), in_tmem(served, range(1300, 1500))) == (0, 200)


def test_what_trims_leave_is_compacted(opened: Open) -> None:
    served = opened()
    pages = range(1100, 2100)
    write(served, pages)
    for page in pages[::2]:
        _core.trim(served.core, PAGE, page * PAGE, 0)
    before = counters(served.pool_path).used_bytes
    rounds(served, 3)
    assert counters(served.pool_path).used_bytes < before * 3 // 4
    assert all(kind is Kind.TMEM for kind in kinds(served.pool_path)[pages.start + 1 : pages.stop : 2])


def test_ages_are_published_when_something_changed(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmemd.device.maintenance.PUBLISH_EVERY", 0.0)
    served = opened()

    def published() -> int:
        with served.pool_path.open("rb") as pool:
            return poolfile.Snapshot().take(pool.fileno(), served.pool_path).ages().published

    rounds(served, 1)
    write(served, range(1100, 1200))
    before = published()
    rounds(served, 5)
    assert published() == before
    _core.pread(served.core, bytearray(PAGE), 1100 * PAGE, 0)
    rounds(served, 5)
    assert published() == before + 1


def test_a_generation_lasts_its_time_however_many_rounds_there_are(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = opened()

    def generation() -> int:
        with served.pool_path.open("rb") as pool:
            return poolfile.Snapshot().take(pool.fileno(), served.pool_path).ages().generation

    grow_old(served, 1)
    before = generation()
    monkeypatch.setattr("tmemd.device.maintenance.GENERATION_SECONDS", 3600.0)
    rounds(served, 200)
    assert generation() == before
    monkeypatch.setattr("tmemd.device.maintenance.GENERATION_SECONDS", 0.0)
    rounds(served, 1)
    assert generation() == before + 1


def test_maintenance_survives_what_goes_wrong_in_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tmemd.device.maintenance.TICK_AFTER_FAILURE", 0.01)
    served = opened()
    ticks, failing = 0, True
    tick = served.maintenance.tick

    def faulty(now: float) -> float:
        nonlocal ticks
        ticks += 1
        if failing:
            raise RuntimeError("no luck")
        return tick(now)

    write(served, range(1100, 1500))
    monkeypatch.setattr(served.maintenance, "tick", faulty)
    served.start()
    wait_until(lambda: ticks > 3, "rounds after one that failed")
    failing = False
    with served.pool_path.open("r+b") as pool:
        requests.ask(pool.fileno(), Request.DEMOTE, LIMIT)
    wait_until(lambda: in_tmem(served, range(1100, 1500)) == 0, "a demotion")
    assert capsys.readouterr().err.count("tmem: x: maintenance failed: RuntimeError('no luck')") == 1


def test_maintenance_idles_only_while_nothing_happens(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    served = opened()
    now = time.monotonic()

    def idles_again() -> bool:
        """Whether it looks at what is new, and idles when that is over."""
        busy = served.maintenance.tick(now) != TICK_WHILE_IDLE
        rounds(served, 3, now)
        return busy and idles()

    def idles() -> bool:
        return served.maintenance.tick(now + IDLE_AFTER) == TICK_WHILE_IDLE

    assert idles_again()
    assert idles()
    _core.pwrite(served.core, compressible(1100, 1), 1100 * PAGE, 0)
    assert idles_again()
    with served.pool_path.open("r+b") as pool:
        for change in (
            lambda fd: poolfile.write_target(fd, LIMIT // 2),
            lambda fd: poolfile.write_frozen(fd, True),
            lambda fd: poolfile.write_demotion_writes(fd, 7),
            lambda fd: poolfile.write_compression(fd, False),
            lambda fd: requests.ask(fd, Request.COMPACT),
        ):
            change(pool.fileno())
            assert idles_again()
    monkeypatch.setattr("tmemd.device.maintenance.GENERATION_SECONDS", 0.0)
    assert not idles(), "a generation has ended"


def test_a_pool_that_is_made_anew_keeps_its_target_and_no_requests(opened: Open, pools: Path) -> None:
    path = pools / "x.pool"
    path.touch(0o600)
    with path.open("r+b") as pool:
        poolfile.write_target(pool.fileno(), LIMIT // 2)
        requests.ask(pool.fileno(), Request.DRAIN)
        opened()
        assert waiting(pool.fileno()) == []
        assert poolfile.read_control(pool.fileno()).target == LIMIT // 2
