"""The host takes its memory back: pools shrink, nothing is lost, and what was taken is given again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.cgroup import Cgroup, memory_cgroup
from tests.support.content import PAGE, content
from tests.support.harness import MIB, Serve, Server, device, taken, wait_until
from tests.support.memoryhog import MemoryHog
from tests.support.writers import pages
from tmemd.governor.host import read_memory
from tmemd.store import poolfile

GUESTS = ("a", "b", "c")
PAGES = 40 * MIB // PAGE
MOST = 256 * MIB  # the budget's maximum


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


@pytest.mark.slow
def test_pools_shrink_for_a_process_that_takes_memory_and_grow_again(serve: Serve, pools: Path, disks: Path) -> None:
    memory = read_memory()[0]
    # Between the reserve and what is available now: far more than the maximum and the band in which nothing is done (a
    # hundredth of RAM), so that other processes do not matter. The hog takes all of that, and as much again.
    room = 2 * MOST + memory.total // 50
    if memory.available < 2 * room + MOST:
        pytest.skip(f"needs {(2 * room + MOST) // MIB} MiB of memory that is available")
    reserve = memory.available - room
    config = f"[budget]\nminimum = '12M'\nmaximum = {MOST}\nreserve = '{reserve}'\npressure = 100\n"
    with fakes.tmemd(pools, config=config) as tmemd:
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
