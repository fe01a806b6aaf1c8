# SPDX-License-Identifier: BSD-3-Clause
"""Trims of a swap device are passed on to a server that gives room back, and never take what was written since."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.content import PAGE, incompressible
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until
from tests.support.index import Kind, kinds
from tests.support.remotes import Remote
from tests.support.writers import Ledger, Writers
from tmemd.store import poolfile
from tmemd.store.requests import Request

SIZE = 64 * MIB
FIRST = 2048  # of pages that are used: none that is written through
PAGES = 1024
REQUESTS = 400  # of the writers, between two events


def remote_state(pool: Path) -> poolfile.RemoteState:
    with open(pool, "rb") as file:
        return poolfile.Snapshot().take(file.fileno(), pool).remote()


def drain(pool: Path) -> int:
    with Control(pool) as control:
        return control.request(Request.DRAIN)


def far_device(serve: Serve, pools: Path, run: Path, uri: str, **keys: object) -> Server:
    return serve(device("far", pools, SIZE, uri, MIB, bitmap=run / "map", timeout=3, **keys))


@pytest.mark.parametrize("keys", [{}, {"flush": "durable"}, {"overflow": "{run}/overflow"}], ids=str)
def test_a_neighbour_gets_the_ram_of_dead_pages_back(
    serve: Serve, pools: Path, tmp_path: Path, keys: dict[str, str]
) -> None:
    near = serve(device("near", pools, SIZE, tmp_path / "near", 16 * MIB))
    keys = {key: value.format(run=tmp_path) for key, value in keys.items()}
    far = far_device(serve, pools, tmp_path, f"nbd+unix:///near?socket={near.socket}", **keys)
    with far.client() as client:
        for page in range(FIRST, FIRST + PAGES):
            client.pwrite(incompressible(page, 1), page * PAGE)
        assert drain(pools / "far.pool") == 0
        before = counters(pools / "near.pool").used_bytes
        kept = FIRST + PAGES // 2
        for first, n in (FIRST, PAGES // 2 - 1), (kept + 1, PAGES // 2 - 1):
            client.trim(n * PAGE, first * PAGE)
        wait_until(lambda: counters(pools / "near.pool").used_bytes < before - 3 * MIB, "the RAM to be given back")
        assert set(kinds(pools / "near.pool")[FIRST : kept - 1]) <= {Kind.NOWHERE, Kind.ZERO}
        for page in kept - 1, kept:
            assert client.pread(PAGE, page * PAGE) == incompressible(page, 1)
        assert client.pread(PAGE, FIRST * PAGE) == bytes(PAGE)


def test_what_is_written_again_stays_whenever_the_server_is_told(serve: Serve, pools: Path, tmp_path: Path) -> None:
    slow = ["--filter=delay", "memory", str(SIZE), "delay-write=1ms", "delay-zero=20ms"]
    with Remote(tmp_path, slow).start() as remote:
        pool, far = pools / "far.pool", far_device(serve, pools, tmp_path, remote.uri)
        ledger = Ledger(PAGES)
        for seed in range(3):
            writers = Writers(ledger, seed, far.connect)
            while not (remote_state(pool).trims or writers.stop.is_set()):  # which begins anew with the process
                ledger.wait_for(REQUESTS, writers.stop)
            far.kill()
            writers.join()
            far.start()
            with far.client() as client:
                ledger.verify(client)
        assert drain(pool) == 0
        assert counters(pool).bad_checksums == 0


def test_pages_that_were_never_in_the_file_are_no_work_for_the_server(
    serve: Serve, pools: Path, tmp_path: Path
) -> None:
    with Remote(tmp_path, ["memory", str(SIZE)]).start() as remote:
        far = far_device(serve, pools, tmp_path, remote.uri)
        pool = pools / "far.pool"
        with far.client() as client:
            for page in range(FIRST, FIRST + 64):
                client.pwrite(incompressible(page, 1), page * PAGE)
            client.trim(64 * PAGE, FIRST * PAGE)
            client.pwrite(incompressible(FIRST, 1), FIRST * PAGE)
            assert drain(pool) == 0
            client.trim(PAGE, FIRST * PAGE)
            wait_until(lambda: remote_state(pool).trims > 0, "it to be told of the one it has")
            assert remote_state(pool).trims == 1


def test_a_server_that_cannot_zero_is_told_nothing(serve: Serve, pools: Path, tmp_path: Path) -> None:
    with Remote(tmp_path, ["--filter=nozero", "memory", str(SIZE)]).start() as remote:
        far = far_device(serve, pools, tmp_path, remote.uri)
        pool = pools / "far.pool"
        with far.client() as client:
            for page in range(FIRST, FIRST + 64):
                client.pwrite(incompressible(page, 1), page * PAGE)
            assert drain(pool) == 0
            client.trim(64 * PAGE, FIRST * PAGE)
            assert set(kinds(pool)[FIRST : FIRST + 64]) == {Kind.ZERO}
            assert drain(pool) == 0  # which needs them in the file
            assert set(kinds(pool)[FIRST : FIRST + 64]) == {Kind.NOWHERE}
        assert remote_state(pool).trims == 0
