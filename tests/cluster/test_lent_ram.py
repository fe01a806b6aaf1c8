# SPDX-License-Identifier: BSD-3-Clause
"""A host whose device has another host's tmem as its backing: pages go from RAM to the neighbour's RAM to his disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.cluster.host import Host, can_have_networks, two_hosts
from tests.support.content import PAGE, content
from tests.support.harness import MIB, ROOT, Server, wait_until
from tests.support.index import Kind, kinds
from tests.support.writers import Ledger, Writers
from tmemd.protocol import PoolStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_have_networks(), reason="no network namespaces to be had"),
]

PAGES = 4096
TAIL = MIB // 2
SIZE = PAGES * PAGE + TAIL
OURS = 2 * MIB  # of RAM, which the writers' pages outgrow
REQUESTS = 300  # of the writers, between two events
TIMEOUT = 3  # seconds that a request may wait for the other host


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def status(host: Host, name: str) -> PoolStatus:
    """What a host's tmemd says of a device."""
    assert host.tmemd
    return host.tmemd.client.pool(name)


def overflowing(host: Host) -> int:
    """The pages in its device's overflow file; -1: it is not known yet."""
    remote = status(host, "web").remote
    return remote.overflow if remote else -1


def target(host: Host, name: str, nbytes: int) -> None:
    """Have a device take no more RAM than that; returns when it does not."""
    assert host.tmemd
    ctl(host, "set", name, f"--target={nbytes}")
    wait_until(lambda: status(host, name).counters.used_bytes <= nbytes, f"{name} to give RAM back")


def ctl(host: Host, *command: str) -> Any:
    """What tmemctl --json prints on a host."""
    words = [sys.executable, "-m", "tmemd.cli", *command, "--json", f"--socket={host.ram}/socket"]
    done = subprocess.run([*host.inside, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lend(host: Host, **keys: object) -> Server:
    """The device that *host* lends."""
    return host.server("lent", SIZE, host.disk / "backing", tcp=True, **keys)


def borrow(host: Host, other: Host, **keys: str | Path) -> Server:
    """The device of *host* that goes on to the *other*."""
    where = f"nbd://{other.address}/lent"
    server = host.server("web", SIZE - TAIL, where, tcp=False, timeout=TIMEOUT, **keys)
    target(host, "web", OURS)
    return server


def test_pages_go_from_ram_to_the_neighbour_s_ram_to_his_disk(hosts: tuple[Host, Host]) -> None:
    ours, theirs = hosts
    lend(theirs)
    web = borrow(ours, theirs, bitmap=ours.disk / "map")
    ledger = Ledger(PAGES)
    writers = Writers(ledger, 1, web.connect)
    ledger.wait_for(REQUESTS, writers.stop)
    wait_until(lambda: status(theirs, "lent").counters.pages_in_tmem > PAGES // 8, "pages to come")
    assert status(theirs, "lent").counters.spills == 0

    target(theirs, "lent", MIB)
    ledger.wait_for(REQUESTS, writers.stop)
    writers.finish()
    now = status(theirs, "lent").counters
    assert now.demotions + now.spills > PAGES // 8
    with web.client() as client:
        ledger.verify(client)
    assert status(theirs, "lent").counters.file_reads > 0
    now = status(ours, "web").counters
    assert (now.bad_checksums, now.io_errors) == (0, 0)


def work(web: Server, ledger: Ledger, requests: int) -> None:
    """Have clients write for so many requests, of which none fails."""
    writers = Writers(ledger, 1, web.connect)
    ledger.wait_for(requests, writers.stop)
    writers.finish()


def pages_of(host: Host, kind: Kind) -> list[int]:
    """The pages of a host's device that are there, or there."""
    return [page for page, is_now in enumerate(kinds(host.ram / "pools/web.pool")) if is_now is kind]


def read(client: nbd.NBD, page: int) -> bytes | None:
    """A page; None: it is an I/O error."""
    try:
        return bytes(client.pread(PAGE, page * PAGE))
    except nbd.Error:
        return None


def reads_from_ram(web: Server, ours: Host, ledger: Ledger) -> None:
    """Read all that is in RAM."""
    with web.client() as client:
        for page in pages_of(ours, Kind.TMEM):
            assert read(client, page) == content(page, ledger.acknowledged[page])


def waits_in_vain(web: Server, ours: Host) -> None:
    """Read what the neighbour has: it is an I/O error in the end, and what is in RAM does not wait for it."""
    page = pages_of(ours, Kind.FILE)[0]
    with web.client() as client:
        assert read(client, page) is None


def judge(web: Server, ledger: Ledger) -> tuple[list[int], list[int]]:
    """The pages that hold something else than what was acknowledged, and those that are I/O errors."""
    with web.client() as client:
        found = [read(client, page) for page in range(PAGES)]
    wrong = [page for page, data in enumerate(found) if data not in {None, content(page, ledger.acknowledged[page])}]
    return wrong, [page for page, data in enumerate(found) if data is None]


@pytest.mark.parametrize(
    ("ram_is_lost", "flush"), [(False, "none"), (True, "durable"), (True, "none")], ids=["killed", "durable", "lossy"]
)
def test_the_neighbour_dies_and_comes_back(hosts: tuple[Host, Host], ram_is_lost: bool, flush: str) -> None:
    ours, theirs = hosts
    lend(theirs, flush=flush)
    web, ledger = borrow(ours, theirs, bitmap=ours.disk / "map"), Ledger(PAGES)
    work(web, ledger, 3 * REQUESTS)
    theirs.link("down")  # first, so that nothing tells that he dies
    theirs.die() if ram_is_lost else theirs.kill()

    waiting = threading.Thread(target=waits_in_vain, args=(web, ours))
    waiting.start()
    reads_from_ram(web, ours, ledger)
    waiting.join()
    wait_until(lambda: status(ours, "web").is_away, "the neighbour to be missed")
    (row,) = ctl(ours, "list")
    assert "file is away" in row["warnings"]
    reads_from_ram(web, ours, ledger)

    theirs.link("up")
    theirs.start()
    wait_until(lambda: not status(ours, "web").is_away, "the neighbour to be back")
    assert (web.log().count("is away"), web.log().count("is back")) == (1, 1)
    wrong, lost = judge(web, ledger)
    assert (wrong, bool(lost)) == ([], ram_is_lost and flush == "none")
    assert not set(lost) & set(pages_of(ours, Kind.TMEM))
    with web.client() as client:
        for page in lost:
            client.pwrite(content(page, 1), page * PAGE)
            assert read(client, page) == content(page, 1)


def test_without_the_neighbour_the_overflow_takes_what_ram_does_not(hosts: tuple[Host, Host]) -> None:
    ours, theirs = hosts
    lend(theirs, flush="durable")
    web = borrow(ours, theirs, bitmap=ours.disk / "map", overflow=ours.disk / "overflow")
    ledger = Ledger(PAGES)
    work(web, ledger, REQUESTS)
    theirs.link("down")
    theirs.die()
    work(web, ledger, 3 * REQUESTS)
    wait_until(lambda: overflowing(ours) > 0, "pages in the overflow")
    web.kill()
    theirs.link("up")
    theirs.start()
    web.start()
    work(web, ledger, REQUESTS)
    wait_until(lambda: overflowing(ours) == 0, "the overflow to be written back")
    assert judge(web, ledger) == ([], [])


@pytest.mark.parametrize("bitmap", ["inside", "outside"])
def test_a_neighbour_that_comes_back_with_nothing_is_not_believed(hosts: tuple[Host, Host], bitmap: str) -> None:
    ours, theirs = hosts
    lend(theirs, flush="durable")
    web, ledger = borrow(ours, theirs, bitmap=bitmap if bitmap == "inside" else ours.disk / "map"), Ledger(PAGES)
    work(web, ledger, 3 * REQUESTS)
    theirs.die()
    wait_until(lambda: status(ours, "web").is_away, "the neighbour to be missed")
    for name in ("backing", "backing.map"):
        (theirs.disk / name).unlink()
    theirs.start()
    if bitmap == "inside":  # it is known for another
        wait_until(lambda: "holds something else" in web.log(), "the empty one to be refused")
        assert status(ours, "web").is_away
        return
    wait_until(lambda: not status(ours, "web").is_away, "another to be there")
    wrong, lost = judge(web, ledger)
    assert (wrong, bool(lost)) == ([], True)
