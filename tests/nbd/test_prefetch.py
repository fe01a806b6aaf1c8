# SPDX-License-Identifier: BSD-3-Clause
"""Pages are fetched ahead of a client that reads along a trend, if the device is told to; whatever happens to it."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible
from tests.support.gate import Gate
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until
from tests.support.remotes import volatile
from tests.support.writers import RUN, Ledger, Writers
from tmemd.store.check import check_pool
from tmemd.store.requests import Request

PAGES = 2048
COLD = range(600, 1000)
CYCLES = 8


def spill(server: Server, pool: Path) -> None:
    """Write pages that are in the file alone from then on."""
    with server.client() as client:
        for page in COLD:
            client.pwrite(compressible(page, 1), page * PAGE)
    with Control(pool) as control:
        assert control.request(Request.DRAIN) == 0


def read(client: nbd.NBD, page: int) -> None:
    """It must be right."""
    assert bytes(client.pread(PAGE, page * PAGE)) == compressible(page, 1)


@pytest.mark.parametrize(("mode", "is_on"), [("yes", True), ("no", False), ("auto", False)])
def test_a_device_does_as_it_is_told(serve: Serve, pools: Path, disk: Path, mode: str, is_on: bool) -> None:
    server, pool = serve(device("ahead", pools, PAGES * PAGE, disk, "32M", prefetch=mode)), pools / "ahead.pool"
    spill(server, pool)
    with server.client() as client:
        for page in COLD[:60]:  # too few for anything to follow from how long they took
            read(client, page)
    now = counters(pool)
    assert (now.prefetching, now.prefetches > 0) == (is_on, is_on)
    assert now.prefetch_hits + now.file_reads == 60
    assert now.prefetch_hits >= 50 * is_on
    assert check_pool(pool).problems == []


@pytest.mark.parametrize("fault", ["!pread", "!short"])
def test_a_file_that_fails_is_said_to_whom_it_concerns(
    serve: Serve, pools: Path, disk: Path, tmp_path: Path, fault: str
) -> None:
    gate = Gate(tmp_path, disk)
    keys = device("ahead", pools, PAGES * PAGE, disk, "32M", prefetch="yes")
    server, pool = serve(keys, wrapper=gate.wrapper), pools / "ahead.pool"
    spill(server, pool)
    with server.client() as client:
        for page in COLD[:100]:
            read(client, page)
        wait_until(lambda: counters(pool).prefetches > counters(pool).prefetch_hits, "pages that nobody has read")
        with gate.closed(fault):
            for page in COLD[:50]:  # in RAM
                read(client, page)
            if fault == "!pread":
                with pytest.raises(nbd.Error, match="Input/output error"):
                    client.pread(PAGE, COLD[-1] * PAGE)
            else:
                read(client, COLD[-1])
        for page in COLD:
            read(client, page)
    assert counters(pool).bad_checksums == 0


def test_a_server_that_hangs_holds_up_only_who_needs_it(serve: Serve, pools: Path, tmp_path: Path) -> None:
    far = volatile(tmp_path / "far", 64 * MIB).start()
    try:
        keys = device("ahead", pools, PAGES * PAGE, far.uri, "32M", prefetch="yes", clients="any")
        server, pool = serve(keys), pools / "ahead.pool"
        spill(server, pool)
        with server.client() as client, server.client() as other:
            for page in COLD[:100]:
                read(client, page)
            far.tell("hang")
            waiting = nbd.Buffer(PAGE)
            cookie = client.aio_pread(waiting, COLD[-1] * PAGE)
            for page in COLD[:100]:
                read(other, page)
            assert not client.aio_command_completed(cookie)
            far.untell("hang")
            while not client.aio_command_completed(cookie):
                client.poll(-1)
            assert bytes(waiting.to_bytearray()) == compressible(COLD[-1], 1)
            for page in COLD:
                read(client, page)
        now = counters(pool)
        assert (now.bad_checksums, now.io_errors) == (0, 0)
        server.kill()
    finally:
        far.kill()


def scan(server: Server, stop: threading.Event, pages: range) -> None:
    """Read them in order again and again, until the server is gone."""
    client = server.connect()
    try:
        while not stop.is_set():
            for page in pages:
                client.pread(PAGE, page * PAGE)
    except nbd.Error:
        stop.set()


@pytest.mark.slow
def test_sigkill_while_pages_are_fetched_beside_writes_trims_and_demotion(
    serve: Serve, pools: Path, disk: Path
) -> None:
    limit = 4 * MIB
    server = serve(device("ahead", pools, PAGES * PAGE, disk, limit, prefetch="yes", clients="any"))
    pool, ledger, fetched = pools / "ahead.pool", Ledger(PAGES), 0
    for cycle in range(CYCLES):
        rng, stop = random.Random(cycle), threading.Event()
        before = counters(pool).prefetches
        scanner = threading.Thread(target=scan, args=(server, stop, range(PAGES)[:: rng.choice([1, -1, 3])]))
        writers = Writers(ledger, cycle, server.connect, threads=2)
        scanner.start()
        with Control(pool) as control:
            for _ in range(rng.randrange(5, 15)):
                control.target(rng.randrange(counters(pool).minimum_bytes + MIB, limit))
                ledger.wait_for(RUN, writers.stop)
                control.request(Request.DEMOTE, MIB // 2)
        fetched += counters(pool).prefetches - before
        server.kill()
        writers.join()
        scanner.join()
        server.start()
        with server.client() as client:
            ledger.verify(client)
        now = counters(pool)
        assert (now.bad_checksums, now.io_errors) == (0, 0)
    assert fetched
