# SPDX-License-Identifier: BSD-3-Clause
"""A cache device seen from outside: its pool is ephemeral, and may be emptied at any time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.content import PAGE
from tests.support.harness import MIB, Control, Serve, cache_device, counters, taken, wait_until
from tests.support.sources import image, is_kept, read_all
from tmemd.client import Client
from tmemd.store.check import check_pool
from tmemd.store.requests import Request

PAGES = 1000  # as many copies as can wait to be put


@pytest.mark.parametrize("served", [True, False], ids=["served", "idle"])
def test_flush_empties_the_pool_and_nobody_reads_anything_else(
    serve: Serve, pools: Path, tmp_path: Path, served: bool
) -> None:
    source, pool = image(tmp_path / "image", PAGES), pools / "golden.pool"
    # A disk that a busy machine makes slow is read ahead of, which is counted as prefetches.
    server = serve(cache_device("golden", pools, source, 64 * MIB, prefetch="no"))
    read_all(server, pool, PAGES)
    full = taken(pool)
    if served:
        with Control(pool) as control:
            assert control.request(Request.FLUSH) == 0
    else:
        wait_until(lambda: is_kept(pool), "the source to be known")
        server.kill()
        assert Client.of_directory(pools).ask("golden", "flush") == 0
        assert check_pool(pool).notes == []
        server.start()
    assert counters(pool).pages_in_tmem == 0
    assert taken(pool) < full - PAGES * PAGE // 4
    before = counters(pool).file_reads
    assert before >= PAGES, "it is the same pool"
    read_all(server, pool, PAGES)
    assert counters(pool).file_reads >= before + PAGES


def test_a_source_that_has_grown_is_attached_through_tmemd(serve: Serve, pools: Path, tmp_path: Path) -> None:
    source = image(tmp_path / "image", 16)
    with fakes.tmemd(pools) as tmemd:
        device = cache_device("golden", pools / "pools", source, 64 * MIB, tmemd=tmemd.socket)
        serve(device).kill()
        image(source, 32)
        server = serve(device)
        status = tmemd.client.pool("golden")
        assert (status.kind, status.source, status.size) == ("ephemeral", str(source), 32 * PAGE)
        read_all(server, pools / "pools/golden.pool", 32)


@pytest.mark.parametrize("trims", [True, False], ids=["trim", "zero"])
def test_what_a_guest_trims_is_free_on_the_host_and_what_it_zeroes_is_not(
    serve: Serve, pools: Path, tmp_path: Path, trims: bool
) -> None:
    source = image(tmp_path / "image", PAGES)
    before = source.stat().st_blocks
    server = serve([*cache_device("golden", pools, source, 64 * MIB), "write=through"])
    with server.client() as client:
        (client.trim if trims else client.zero)(PAGES * PAGE // 2, 0)
        assert client.pread(PAGE, 0) == bytes(PAGE)
        client.flush()
    assert source.read_bytes()[: PAGES * PAGE // 2] == bytes(PAGES * PAGE // 2)
    assert (source.stat().st_blocks < before * 3 // 4) is trims


def test_zeroing_is_not_said_to_be_fast_where_the_source_is_written(serve: Serve, pools: Path, tmp_path: Path) -> None:
    source = image(tmp_path / "image", PAGES)
    server = serve([*cache_device("golden", pools, source, 64 * MIB), "write=through"])
    with server.client() as client:
        assert client.can_zero()
        assert not client.can_fast_zero()
