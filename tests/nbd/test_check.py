# SPDX-License-Identifier: BSD-3-Clause
"""The page path's own pools, read by the verifier that shares no code with it."""

from __future__ import annotations

import os
import random
from array import array
from pathlib import Path

import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, counters, device, taken
from tests.support.writers import Ledger, Writers
from tmemd.store.check import Report, check_pool
from tmemd.store.poolfile import read_identity
from tmemd.store.requests import Request

PAGES = 4096


def check(pool: Path) -> Report:
    report = check_pool(pool)
    assert report.problems == []
    return report


def loaded(server: Server, seed: int, requests: int) -> Ledger:
    """The server after so many writes and trims."""
    ledger = Ledger(PAGES)
    writers = Writers(ledger, seed, server.connect)
    ledger.wait_for(requests, writers.stop)
    writers.stop.set()
    writers.join()
    return ledger


@pytest.mark.parametrize("limit", ["4M", "64M"])
def test_a_pool_that_was_closed_has_nothing_to_note(serve: Serve, pools: Path, disk: Path, limit: str) -> None:
    server = serve(device("web", pools, PAGES * PAGE, disk, limit))
    loaded(server, 1, 3000)
    with Control(pools / "web.pool") as control:
        assert control.request(Request.COMPACT) == 0
    now = counters(pools / "web.pool")
    assert server.stop() == 0
    report = check(pools / "web.pool")
    assert report.notes == []
    assert report.records == report.pages["tmem"] == now.pages_in_tmem > 0
    assert report.pages["file"] == now.pages_in_file


def test_a_pool_without_a_file(serve: Serve, pools: Path) -> None:
    server = serve(device("web", pools, PAGES * PAGE, "none", "64M"))
    loaded(server, 2, 1000)
    assert server.stop() == 0
    assert check(pools / "web.pool").pages["file"] == 0


def test_a_pool_in_use(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("web", pools, PAGES * PAGE, disk, "6M"))
    ledger = Ledger(PAGES)
    writers = Writers(ledger, 3, server.connect)
    rng = random.Random(3)
    try:
        with Control(pools / "web.pool") as control:
            for _ in range(10):
                ledger.wait_for(50, writers.stop)
                assert check(pools / "web.pool").served
                control.target(rng.randrange(counters(pools / "web.pool").minimum_bytes, 6 * MIB))
    finally:
        writers.stop.set()
        writers.join()
    assert writers.failed == []


def places(report: Report) -> dict[str, int]:
    """How many pages are where. Zeros that were on their way to the file are brought there by attaching."""
    pages = dict(report.pages)
    pages["nowhere"] += pages.pop("zero")
    return pages


def test_a_killed_plugins_pool_is_sound_before_and_after_the_next_attach(serve: Serve, pools: Path, disk: Path) -> None:
    pool = pools / "web.pool"
    server = serve(device("web", pools, PAGES * PAGE, disk, "16M"))
    for seed in range(10):
        writers = Writers(ledger := Ledger(PAGES), seed, server.connect)
        ledger.wait_for(200, writers.stop)
        server.kill()
        writers.join()
        before = check(pool)
        server.start()
        after = check(pool)
        assert places(after) == places(before)
        assert counters(pool).used_bytes == taken(pool)


def test_every_bit_of_damage_to_a_real_pool_is_found(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("web", pools, PAGES * PAGE, disk, "64M"))
    with server.client() as client:
        for page in range(1, PAGES):
            client.pwrite(content(page, 1), page * PAGE)
    server.kill()
    rng = random.Random(4)
    with open(pools / "web.pool", "r+b", buffering=0) as file:
        identity = read_identity(file.fileno(), "web")
        assert identity
        words = array("Q", os.pread(file.fileno(), PAGES * 8, identity.index_offset))
        for word in rng.sample([word for word in words if word & 7 == 1], 50):
            at = identity.data_offset + (word >> 28) * 16 + rng.randrange(12 + (word >> 12 & 0x1FFF))
            damaged = os.pread(file.fileno(), 1, at)[0] ^ 1 << rng.randrange(8)
            os.pwrite(file.fileno(), bytes([damaged]), at)
    assert len(check_pool(pools / "web.pool").problems) == 50
