"""The host takes its memory back: pools shrink, nothing is lost, and what was taken is given again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.content import PAGE, content
from tests.crash.writers import pages
from tests.harness import MIB, Server, device, taken, wait_until
from tests.memoryhog import MemoryHog
from tests.unit import fakes
from tmemd.host import read_memory

GUESTS = ("a", "b", "c")
PAGES = 64 * MIB // PAGE
GIB = 1 << 30
HOG = 2 * GIB
# Between the reserve and what is available before the hog comes: it takes all of that, and as much again.
ROOM = GIB


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


@pytest.fixture
def disks() -> Iterator[Path]:
    """A directory on disk."""
    path = Path(tempfile.mkdtemp(prefix="tmemd-test-", dir="/var/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def test_pools_shrink_for_a_process_that_takes_memory_and_grow_again(serve: Serve, pools: Path, disks: Path) -> None:
    available = read_memory()[0].available
    if available < HOG + 2 * GIB:
        pytest.skip("needs 4 GiB of memory that is available")
    reserve = available - ROOM
    config = f"[budget]\nminimum = '12M'\nmaximum = '900M'\nreserve = '{reserve}'\npressure = 100\n"
    with fakes.tmemd(pools, config=config) as tmemd:
        parameters = [word for name in GUESTS for word in governed(pools, name, disks / name)]
        server = serve(parameters)
        files = [pools / "pools" / f"{name}.pool" for name in GUESTS]
        for name in GUESTS:
            fill(server, name)
        before = sum(map(taken, files))
        assert before > 60 * MIB
        with MemoryHog() as hog:
            hog.hold(HOG)
            wait_until(lambda: tmemd.client.host().budget_bytes == 12 * MIB, "the budget to be taken back")
            wait_until(lambda: sum(map(taken, files)) <= 12 * MIB, "the pools to shrink")
            host = tmemd.client.host()
            assert host.targets_bytes <= host.budget_bytes
            assert all(status.counters.used_bytes <= status.target_bytes for status in tmemd.client.pools())
            assert [wrong(server, name) for name in GUESTS] == [[], [], []]
        wait_until(lambda: tmemd.client.host().targets_bytes >= before, "targets to grow back")
        for name in GUESTS:
            fill(server, name)
        assert sum(map(taken, files)) > 60 * MIB
        assert [wrong(server, name) for name in GUESTS] == [[], [], []]
        assert all(status.counters.io_errors == 0 for status in tmemd.client.pools())
