# SPDX-License-Identifier: BSD-3-Clause
"""The host takes its memory back: pools shrink, nothing is lost, and what was taken is given again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbd
import pytest

from tests.support import fakes
from tests.support.cgroup import Cgroup, memory_cgroup
from tests.support.content import PAGE, content
from tests.support.harness import MIB, Serve, Server, cache_device, device, taken, wait_until
from tests.support.memoryhog import MemoryHog
from tests.support.writers import pages
from tmemd.governor.host import read_memory
from tmemd.store import poolfile

GUESTS = ("a", "b", "c")
PAGES = 40 * MIB // PAGE
MOST = 256 * MIB  # the budget's maximum
BUDGET = f"[budget]\nminimum = '{{}}'\nmaximum = {MOST}\nreserve = '{{}}'\npressure = 100\n"


def governed(base: Path, name: str, disk: Path) -> list[str]:
    """A device that has its pool from the tmemd below *base*."""
    return device(name, base / "pools", PAGES * PAGE, disk, "1G", tmemd=base / "socket")


def fill(server: Server, name: str) -> None:
    with server.client(name) as client:
        for page in range(PAGES):
            client.pwrite(content(page, ord(name)), page * PAGE)


def wrong(server: Server, name: str) -> list[int]:
    with server.client(name) as client:
        return [page for page, data in enumerate(pages(client, PAGES)) if data != content(page, ord(name))]


def room_and_reserve() -> tuple[int, int]:
    """How many bytes lie between what is available and a reserve, and that reserve; a hog is to take twice as many.

    It is far more than the maximum and the band in which nothing is done (a hundredth of RAM), so that other processes
    do not matter.
    """
    memory = read_memory()[0]
    room = 2 * MOST + memory.total // 50
    if memory.available < 2 * room + MOST:
        pytest.skip(f"needs {(2 * room + MOST) // MIB} MiB of memory that is available")
    return room, memory.available - room


class Reader(threading.Thread):
    """Reads devices from end to end, one after the other, again and again until the end of a with block."""

    def __init__(self, server: Server, names: Sequence[str]) -> None:
        super().__init__()
        self._server, self._names = server, names
        self._over = threading.Event()
        self.rounds = 0
        self.wrong: list[object] = []

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self.wrong += [page for name in self._names for page in wrong(self._server, name)]
                self.rounds += 1
        except nbd.Error as error:
            self.wrong.append(error)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.slow
def test_copies_go_before_swapped_pages_that_are_used_as_much(serve: Serve, pools: Path, disks: Path) -> None:
    image = disks / "image"
    image.write_bytes(b"".join(content(page, ord("g")) for page in range(PAGES)))
    room, reserve = room_and_reserve()
    with fakes.tmemd(pools, config=BUDGET.format(12 * MIB, reserve)) as tmemd:
        golden = cache_device("g", pools / "pools", image, "1G", tmemd=pools / "socket")
        server = serve([*governed(pools, "a", disks / "a"), *golden])
        fill(server, "a")
        swapped = tmemd.client.pool("a").counters.used_bytes

        def at_least(minimum: int) -> None:
            (pools / "tmemd.toml").write_text(BUDGET.format(minimum, reserve))
            tmemd.process.send_signal(signal.SIGHUP)

        def used() -> int:
            return sum(status.counters.used_bytes for status in tmemd.client.pools())

        at_least(swapped + 4 * MIB)
        with Reader(server, "ag") as reader:
            wait_until(lambda: reader.rounds > 1 and used() > swapped + 12 * MIB, "copies of the image")
            with MemoryHog() as hog:
                hog.hold(2 * room)
                wait_until(lambda: used() <= swapped + 4 * MIB, "copies to go")
                status = tmemd.client.pool("a")
                assert status.counters.demotions == 0
                assert status.target_bytes >= status.counters.used_bytes
                at_least(12 * MIB)
                wait_until(lambda: used() <= 12 * MIB, "swapped pages to go")
                copies = tmemd.client.pool("g")
                assert copies.target_bytes == copies.counters.minimum_bytes
            wait_until(lambda: tmemd.client.pool("g").counters.used_bytes > 12 * MIB, "copies to come again")
        assert reader.wrong == []
        assert [status.counters.io_errors for status in tmemd.client.pools()] == [0, 0]


@pytest.mark.slow
def test_pools_shrink_for_a_process_that_takes_memory_and_grow_again(serve: Serve, pools: Path, disks: Path) -> None:
    room, reserve = room_and_reserve()
    with fakes.tmemd(pools, config=BUDGET.format(12 * MIB, reserve)) as tmemd:
        parameters = [word for name in GUESTS for word in governed(pools, name, disks / name)]
        server = serve(parameters)
        files = [pools / "pools" / f"{name}.pool" for name in GUESTS]
        for name in GUESTS:
            fill(server, name)
        before = sum(map(taken, files))
        assert before > 36 * MIB
        with MemoryHog() as hog:
            hog.hold(2 * room)
            wait_until(lambda: tmemd.client.host().budget_bytes == 12 * MIB, "the budget to be taken back")
            wait_until(lambda: sum(map(taken, files)) <= 12 * MIB, "the pools to shrink")
            host = tmemd.client.host()
            assert host.targets_bytes <= host.budget_bytes
            # What they are may still move between them.
            wait_until(
                lambda: all(status.counters.used_bytes <= status.target_bytes for status in tmemd.client.pools()),
                "each pool to keep to its target",
            )
            assert [wrong(server, name) for name in GUESTS] == [[], [], []]

        def filled_again() -> bool:
            for name in GUESTS:
                fill(server, name)
            return sum(map(taken, files)) > 36 * MIB

        wait_until(filled_again, "the pools to grow again")
        assert [wrong(server, name) for name in GUESTS] == [[], [], []]
        assert all(status.counters.io_errors == 0 for status in tmemd.client.pools())


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A memory cgroup for all of it."""
    if os.geteuid():
        pytest.skip("making cgroups needs root")
    with memory_cgroup(400 * MIB) as made:
        try:
            yield made
        finally:
            wait_until(lambda: not (made.path / "cgroup.procs").read_text(), "everybody to leave the cgroup")


def available(group: Cgroup) -> int:
    """What the group can still take: what is not in use, and the page cache, which the kernel drops."""
    stat = dict(line.split() for line in (group.path / "memory.stat").read_text().splitlines())
    cache = sum(int(stat.get(f"total_{key}", stat[key])) for key in ("inactive_file", "active_file"))
    return group.limit - group.usage + cache


@pytest.mark.slow
def test_inside_a_memory_cgroup_its_limit_is_what_there_is(
    serve: Serve, pools: Path, disks: Path, group: Cgroup
) -> None:
    config = "[budget]\nmaximum = '50%'\nreserve = '20%'\npressure = 100\n"
    with fakes.tmemd(pools, config=config) as tmemd:
        (group.path / "cgroup.procs").write_text(str(tmemd.process.pid))
        wait_until(lambda: tmemd.client.host().total_bytes == 400 * MIB, "the cgroup's limit to be seen")
        parameters = [word for name in GUESTS for word in governed(pools, name, disks / name)]
        server = serve(parameters, wrapper=group.wrapper())
        files = [pools / "pools" / f"{name}.pool" for name in GUESTS]
        try:
            for name in GUESTS:
                fill(server, name)
            before = sum(map(taken, files))
            assert before > 36 * MIB
            reserve = tmemd.client.host().reserve_bytes
            with MemoryHog(group.wrapper()) as hog:
                held = 0
                while sum(map(taken, files)) > before / 2:
                    held += 32 * MIB
                    assert held < group.limit
                    hog.hold(held)
                    wait_until(lambda: available(group) >= reserve, "the reserve to be kept again")
                assert [wrong(server, name) for name in GUESTS] == [[], [], []]
            assert group.kills() == 0
            wait_until(lambda: tmemd.client.host().targets_bytes >= before, "targets to grow back")
        finally:
            server.kill()
            for file in files:
                file.unlink(missing_ok=True)  # its memory is charged to the cgroup, which could not be removed before


WRITES = (
    "[budget]\nminimum = '1G'\nmaximum = '1G'\nreserve = '{}'\npressure = 100\n[demotion]\nwrites_per_hour = '16M'\n"
)
SAVED_UP = 16 * MIB // 4 // PAGE


def test_demotion_writes_no_more_than_it_may_except_below_the_reserve(serve: Serve, pools: Path, disks: Path) -> None:
    with fakes.tmemd(pools, config=WRITES.format(0)) as tmemd:
        server = serve(governed(pools, "a", disks / "a"))
        fill(server, "a")
        wait_until(lambda: bound(pools) is not None, "the governor to have seen the pool")
        tmemd.client.set_target("a", 4 * MIB)
        wait_until(lambda: demoted(tmemd) > SAVED_UP * 0.9, "as much to be demoted as may be written")
        status = tmemd.client.pool("a")
        assert status.counters.used_bytes > 8 * MIB
        written, allowed = demoted(tmemd), bound(pools)
        assert allowed is not None
        assert written <= allowed
        (pools / "tmemd.toml").write_text(WRITES.format("100%"))
        tmemd.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: tmemd.client.pool("a").counters.used_bytes <= 4 * MIB, "the pool to shrink below the reserve"
        )
        left = tmemd.client.host().writes_left_bytes
        assert left is not None
        assert left < SAVED_UP * PAGE / 10, "what was written unbidden is not saved up, but more comes in all the time"
        assert wrong(server, "a") == []


def bound(pools: Path) -> int | None:
    with (pools / "pools/a.pool").open("rb") as pool:
        return poolfile.read_control(pool.fileno()).demotion_writes


def demoted(tmemd: fakes.Tmemd) -> int:
    return tmemd.client.pool("a").counters.demotion_writes
