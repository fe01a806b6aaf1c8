# SPDX-License-Identifier: BSD-3-Clause
"""A damaged byte is an I/O error for its page, and is counted; every other page is untouched."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible, incompressible
from tests.support.harness import Control, Serve, Server, counters, device
from tests.support.index import RECORD_HEADER, record_offset
from tmemd.store.requests import Request

PAGES = 256
VICTIM = 77


def page(number: int) -> bytes:
    """Some pages compress, some do not."""
    return (incompressible if number % 2 else compressible)(number, 1)


@pytest.fixture
def server(serve: Serve, pools: Path, disk: Path) -> Server:
    """A device all of whose pages are in tmem."""
    server = serve(device("flip", pools, PAGES * PAGE, disk, "8M"))
    with server.client() as client:
        for number in range(PAGES):
            client.pwrite(page(number), number * PAGE)
    return server


def flip(path: Path, offset: int) -> None:
    """Change one bit of one byte."""
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def assert_only_the_victim_is_lost(server: Server, pool: Path) -> None:
    with server.client() as client:
        for number in range(PAGES):
            if number == VICTIM:
                with pytest.raises(nbd.Error) as error:
                    client.pread(PAGE, number * PAGE)
                assert error.value.errnum == errno.EIO
            else:
                assert client.pread(PAGE, number * PAGE) == page(number)
        assert counters(pool).bad_checksums > 0
        assert f"error: flip: {PAGE} bytes at {VICTIM * PAGE}: Input/output error\n" in server.log()
        assert "Traceback" not in server.log()
        client.pwrite(page(VICTIM), VICTIM * PAGE)
        assert client.pread(PAGE, VICTIM * PAGE) == page(VICTIM)


@pytest.mark.parametrize("where", [0, 4, 8, 10, RECORD_HEADER, RECORD_HEADER + 20, RECORD_HEADER + 1000])
def test_invariant_7_a_damaged_record_is_eio_for_its_page(server: Server, pools: Path, where: int) -> None:
    pool = pools / "flip.pool"
    flip(pool, record_offset(pool, VICTIM) + where)
    assert_only_the_victim_is_lost(server, pool)


@pytest.mark.parametrize("where", [0, 2000, 4095])
def test_invariant_7_a_damaged_page_of_the_file_is_eio(server: Server, pools: Path, disk: Path, where: int) -> None:
    pool = pools / "flip.pool"
    with Control(pool) as control:
        assert control.request(Request.DRAIN) == 0
    assert counters(pool).pages_in_tmem == 0
    flip(disk, VICTIM * PAGE + where)
    assert_only_the_victim_is_lost(server, pool)


def test_invariant_7_a_damaged_record_is_not_demoted_into_a_good_page(server: Server, pools: Path) -> None:
    pool = pools / "flip.pool"
    flip(pool, record_offset(pool, VICTIM) + RECORD_HEADER)
    with Control(pool) as control:
        control.request(Request.DEMOTE, PAGES * PAGE)
    assert_only_the_victim_is_lost(server, pool)


def test_invariant_8_a_damaged_page_in_a_long_read_leaves_the_others_readable(server: Server, pools: Path) -> None:
    pool = pools / "flip.pool"
    flip(pool, record_offset(pool, VICTIM) + RECORD_HEADER)
    with server.client() as client, pytest.raises(nbd.Error):
        client.pread(PAGES * PAGE, 0)
    assert_only_the_victim_is_lost(server, pool)
