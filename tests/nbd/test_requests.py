# SPDX-License-Identifier: BSD-3-Clause
"""Requests through libnbd: sizes and offsets of every kind, and what each NBD command promises."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible, content, incompressible
from tests.support.harness import MIB, Serve, Server, counters, device, taken, wait_until
from tests.support.reference import Reference

SIZE = 8 * MIB + 512


@pytest.fixture(params=["plenty", "little"])
def server(request: pytest.FixtureRequest, serve: Serve, pools: Path, disk: Path) -> Server:
    """A device whose pages all fit in tmem, or hardly any."""
    limit = {"plenty": "16M", "little": "1M"}[request.param]
    return serve(device("odd", pools, SIZE, disk, limit))


@pytest.fixture
def handle(server: Server) -> Iterator[nbd.NBD]:
    """A connection to it."""
    with server.client() as client:
        yield client


@pytest.mark.parametrize("length", [1, 2, 3, 511, 512, 513, 1024, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 70_000])
def test_requests_of_any_size_at_any_offset(handle: nbd.NBD, length: int) -> None:
    reference = Reference(SIZE)
    rng = random.Random(length)
    for step in range(120):
        offset = rng.choice([rng.randrange(SIZE - length + 1), rng.randrange(20) * 512, SIZE - length])
        data = (content(step, step + 1) * 20)[step : step + length]
        handle.pwrite(data, offset)
        reference.write(offset, data)
        around = max(0, offset - 5)
        length_around = min(length + 10, SIZE - around)
        assert handle.pread(length_around, around) == reference.read(around, length_around)
    assert b"".join(handle.pread(min(MIB, SIZE - at), at) for at in range(0, SIZE, MIB)) == reference.whole()


def test_requests_beyond_the_end_are_errors(handle: nbd.NBD) -> None:
    with pytest.raises(nbd.Error):
        handle.pread(512, SIZE)
    with pytest.raises(nbd.Error):
        handle.pwrite(b"x" * 1024, SIZE - 512)
    assert handle.pread(512, SIZE - 512) == bytes(512)


def test_trim_gives_whole_pages_back_and_nothing_stale(handle: nbd.NBD) -> None:
    handle.pwrite(b"a" * 4 * PAGE, 0)
    handle.trim(2 * PAGE + 10, PAGE - 5)
    data = handle.pread(4 * PAGE, 0)
    assert data[: PAGE - 5] == b"a" * (PAGE - 5)
    assert data[PAGE : 3 * PAGE] == bytes(2 * PAGE)
    assert data[3 * PAGE + 5 :] == b"a" * (PAGE - 5)


def test_trimmed_memory_returns_to_the_host(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("trim", pools, "32M", disk, "64M"))
    with server.client() as client:
        for page in range(0, 4096, 64):
            client.pwrite(b"".join(incompressible(n, 1) for n in range(page, page + 64)), page * PAGE)
        full = taken(pools / "trim.pool")
        assert full > 16 * MIB
        client.trim(32 * MIB, 0)
        wait_until(lambda: taken(pools / "trim.pool") < full // 8, "trimmed memory to return")


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA])
def test_zero_zeroes_exactly_the_bytes_asked_for(handle: nbd.NBD, flags: int) -> None:
    handle.pwrite(b"a" * 4 * PAGE, 0)
    handle.zero(2 * PAGE + 10, PAGE - 5, flags)
    assert handle.pread(4 * PAGE, 0) == b"a" * (PAGE - 5) + bytes(2 * PAGE + 10) + b"a" * (PAGE - 5)


def test_fast_zero_is_offered_and_zeroes(handle: nbd.NBD) -> None:
    assert handle.can_fast_zero()
    handle.pwrite(b"a" * PAGE, 0)
    handle.zero(PAGE, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert handle.pread(PAGE, 0) == bytes(PAGE)


def test_extents_say_where_zeros_are(handle: nbd.NBD) -> None:
    handle.pwrite(b"".join(compressible(n, 1) for n in range(4, 8)), 4 * PAGE)
    handle.pwrite(compressible(20, 1), 20 * PAGE)
    handle.trim(PAGE, 5 * PAGE)
    seen: list[tuple[int, int]] = []

    def remember(_context: str, _offset: int, entries: list[int], _error: int) -> None:
        seen.extend(zip(entries[::2], entries[1::2], strict=True))

    at = 0
    zeros = bytearray()
    while at < 32 * PAGE:
        seen.clear()
        handle.block_status(32 * PAGE - at, at, remember)
        for length, kind in seen:
            zeros += bytes([bool(kind & nbd.STATE_ZERO)]) * length
            at += length
    pages = [zeros[n * PAGE : (n + 1) * PAGE] for n in range(32)]
    assert [n for n, page in enumerate(pages) if not any(page)] == [4, 6, 7, 20]
    assert all(len(set(page)) == 1 for page in pages)


def test_cache_brings_pages_back_without_changing_them(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("cache", pools, "4M", disk, "16M"))
    with server.client() as client:
        for page in range(64):
            client.pwrite(compressible(page, 1), page * PAGE)
        client.cache(64 * PAGE, 0)
        assert client.pread(64 * PAGE, 0) == b"".join(compressible(page, 1) for page in range(64))


def test_flush_and_fua_succeed(handle: nbd.NBD) -> None:
    handle.pwrite(content(1, 1), PAGE, nbd.CMD_FLAG_FUA)
    handle.flush()
    handle.trim(PAGE, 3 * PAGE, nbd.CMD_FLAG_FUA)
    assert handle.pread(PAGE, PAGE) == content(1, 1)


def test_what_the_device_says_of_itself(handle: nbd.NBD) -> None:
    assert handle.get_size() == SIZE
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert handle.get_block_size(nbd.SIZE_PREFERRED) == PAGE
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) >= MIB
    assert not handle.is_rotational()
    assert not handle.is_read_only()
    assert handle.can_multi_conn()
    assert handle.can_trim()
    assert handle.can_zero()
    assert handle.can_flush()
    assert handle.can_fua()
    assert handle.can_cache()


def test_multi_conn_what_one_connection_wrote_another_reads(server: Server) -> None:
    with server.client() as one, server.client() as two:
        for step in range(200):
            one.pwrite(content(step % 7, step + 1), step % 7 * PAGE)
            assert two.pread(PAGE, step % 7 * PAGE) == content(step % 7, step + 1)


def test_a_hundred_connections_then_sigterm_exits_0(server: Server) -> None:
    for n in range(100):
        with server.client() as client:
            client.pwrite(content(n, 1), n * PAGE)
            assert client.pread(PAGE, n * PAGE) == content(n, 1)
    assert server.stop() == 0
    assert "error" not in server.log().lower()


def test_the_same_command_again_attaches_to_the_pool(server: Server, pools: Path) -> None:
    with server.client() as client:
        for page in range(1, 500):
            client.pwrite(content(page, 3), page * PAGE)
    assert server.stop() == 0
    before = counters(pools / "odd.pool")
    server.start()
    with server.client() as client:
        assert [page for page in range(1, 500) if client.pread(PAGE, page * PAGE) != content(page, 3)] == []
    after = counters(pools / "odd.pool")
    assert (after.pages_in_tmem, after.pages_in_file) == (before.pages_in_tmem, before.pages_in_file)


def test_ram_only_refused_put_is_eio_and_changes_nothing_else(serve: Serve, pools: Path) -> None:
    server = serve(device("ram", pools, "32M", "none", "4M"))
    stored, refused = [], []
    with server.client() as client:
        for page in range(2048):
            try:
                client.pwrite(incompressible(page, 1), page * PAGE)
            except nbd.Error as error:
                assert error.errnum == errno.EIO  # noqa: PT017
                refused.append(page)
            else:
                stored.append(page)
        assert stored
        assert refused
        assert [page for page in stored if client.pread(PAGE, page * PAGE) != incompressible(page, 1)] == []
        assert [page for page in refused if client.pread(PAGE, page * PAGE).strip(b"\0")] == []
    assert counters(pools / "ram.pool").used_bytes <= 4 * MIB


def test_a_device_of_1_tib_opens(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("huge", pools, "1T", disk, "4G", reserve="no"))
    with server.client() as client:
        last = (1 << 40) - PAGE
        client.pwrite(compressible(1, 1), last)
        assert client.pread(PAGE, last) == compressible(1, 1)
        assert client.pread(PAGE, 1 << 39) == bytes(PAGE)
    now = counters(pools / "huge.pool")
    assert now.index_bytes == (1 << 40) // PAGE * 8
    assert now.used_bytes - now.index_bytes < MIB
