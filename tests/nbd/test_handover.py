# SPDX-License-Identifier: BSD-3-Clause
"""A device that is handed over while clients write: after a FLUSH its file has everything, for another host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, cache_device, counters, device, wait_until
from tests.support.index import Kind, kinds, record_offset
from tests.support.kills import requests
from tests.support.writers import Ledger, Writers
from tmemd.cli import main
from tmemd.store import bitmapfile
from tmemd.store.requests import Request

PAGES = 2048
Output = pytest.CaptureFixture[str]


def ctl(pools: Path, *command: str) -> int:
    return main([*command, f"--pools={pools}"])


def regions_set(disk: Path) -> int:
    """How many regions the bitmap calls stale, on the disk."""
    with open(f"{disk}.map", "rb") as bitmap:
        header = bitmapfile.read_header(bitmap.fileno(), disk)
        return sum(bitmapfile.read_bits(bitmap.fileno(), header))


@pytest.fixture
def server(serve: Serve, pools: Path, disk: Path) -> Server:
    """A device that has room for half of its pages in RAM."""
    return serve(device("web", pools, PAGES * PAGE, disk, 4 * MIB))


def verify_elsewhere(serve: Serve, pools: Path, disk: Path, ledger: Ledger) -> None:
    """Serve the file with a new pool, as another host does."""
    there = pools / "there"
    there.mkdir()
    other = serve(device("web", there, PAGES * PAGE, disk, 4 * MIB))
    assert counters(there / "web.pool").pages_lost == 0
    with other.client() as client:
        ledger.verify(client)


@pytest.mark.parametrize("restarted", [False, True])
def test_another_host_finds_everything(serve: Serve, server: Server, pools: Path, disk: Path, restarted: bool) -> None:
    ledger = Ledger(PAGES)
    writers = Writers(ledger, 1, server.connect)
    ledger.wait_for(300, writers.stop)
    assert ctl(pools, "handover", "web") == 0
    assert counters(pools / "web.pool").pages_in_tmem > 0
    ledger.wait_for(300, writers.stop)
    writers.stop.set()
    writers.join()
    if restarted:
        server.kill()
        server.start()
        with server.client() as client:
            client.pwrite(content(5, 1 << 30), 5 * PAGE)
            ledger.acknowledged[5] = 1 << 30
    with server.client() as client:
        client.flush()
    assert regions_set(disk) == 0
    server.kill()
    verify_elsewhere(serve, pools, disk, ledger)


def test_until_it_is_handed_back(server: Server, pools: Path, disk: Path, capsys: Output) -> None:
    ledger = Ledger(PAGES)
    writers = Writers(ledger, 1, server.connect)
    for _ in range(5):
        for command in (["handover", "web"], ["handover", "--json", "web"], ["handover", "--cancel", "web"]):
            before = requests(pools / "web.pool")
            assert ctl(pools, *command) == 0
            ledger.wait_for(20, writers.stop)
            assert requests(pools / "web.pool") > before
        assert ctl(pools, "list") == 0
    assert '"handed_over": true' in capsys.readouterr().out
    writers.stop.set()
    writers.join()
    assert regions_set(disk) > 0
    assert Kind.ZERO in kinds(pools / "web.pool")  # a trim that is not written through
    server.kill()
    server.start()
    with server.client() as client:
        ledger.verify(client)


def test_a_request_that_nobody_has_answered_is_done_by_the_next(server: Server, pools: Path, disk: Path) -> None:
    with server.client() as client:
        client.pwrite(content(200, 1), 200 * PAGE)
    server.kill()
    with Control(pools / "web.pool") as control:
        number = control.ask(Request.HANDOVER)
        server.start()
        wait_until(lambda: control.answered(number), "the handover")
    assert regions_set(disk) == 0
    with open(disk, "rb") as file:
        assert os.pread(file.fileno(), PAGE, 200 * PAGE) == content(200, 1)


def test_what_was_lost_cannot_be_handed_over(server: Server, pools: Path, disk: Path, capsys: Output) -> None:
    with server.client() as client:
        client.pwrite(content(200, 1), 200 * PAGE)
    server.kill()
    (pools / "web.pool").unlink()
    server.start()
    assert ctl(pools, "handover", "web") == 1
    assert "handover of web failed: pages were lost with the host" in capsys.readouterr().err
    with server.client() as client:
        client.trim(PAGES * PAGE, 0)
        client.pwrite(content(201, 1), 201 * PAGE)
    assert ctl(pools, "handover", "web") == 0
    assert regions_set(disk) == 0


def test_a_damaged_page_cannot_be_handed_over(server: Server, pools: Path, capsys: Output) -> None:
    with server.client() as client:
        client.pwrite(b"x" * PAGE, 300 * PAGE)
        with open(pools / "web.pool", "r+b") as pool:
            os.pwrite(pool.fileno(), b"y", record_offset(pools / "web.pool", 300) + 14)
        assert ctl(pools, "handover", "web") == 1
        assert "handover of web failed: Input/output error" in capsys.readouterr().err
        client.pwrite(content(300, 1), 300 * PAGE)
        assert ctl(pools, "handover", "web") == 0


def test_what_has_no_file_or_a_source_is_refused(serve: Serve, pools: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    cache = cache_device("cache", pools, tmp_path / "image", "2M")
    serve([*device("ram", pools, MIB, "none", "2M"), *cache])
    for name, words in ("ram", "no backing file"), ("cache", "needs no handover"):
        assert ctl(pools, "handover", name) == 1
        assert words in capsys.readouterr().err
