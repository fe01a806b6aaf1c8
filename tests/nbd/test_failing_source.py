# SPDX-License-Identifier: BSD-3-Clause
"""A source that fails: an error for the request that met it and nothing else, and never anything but what it holds."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible, incompressible
from tests.support.gate import Gate
from tests.support.harness import MIB, Control, Serve, Server, cache_device, counters, wait_until
from tests.support.sources import image, is_kept, read_all
from tests.support.writers import pages
from tmemd.store.requests import Request

PAGES = 512
RUN = 64  # pages that reach the source at once


class Device:
    """A cache device whose source fails at will."""

    def __init__(self, serve: Serve, pools: Path, directory: Path, **keys: object) -> None:
        self.source, self.pool = image(directory / "image", PAGES), pools / "golden.pool"
        self.gate = Gate(directory, self.source)
        parameters = cache_device("golden", pools, self.source, 8 * MIB, **keys)
        self.server: Server = serve(parameters, wrapper=self.gate.wrapper)

    def empty(self) -> None:
        """Have no page in tmem."""
        with Control(self.pool) as control:
            assert control.request(Request.FLUSH) == 0

    def on_disk(self, page: int) -> bytes:
        """What the source holds."""
        with self.source.open("rb") as file:
            return os.pread(file.fileno(), PAGE, page * PAGE)

    def change(self, page: int, data: bytes) -> None:
        """Write to the source behind the device's back."""
        with self.source.open("r+b") as file:
            os.pwrite(file.fileno(), data, page * PAGE)

    def assert_is_source(self, client: nbd.NBD) -> None:
        """Every page is read as the source has it, twice."""
        for _ in range(2):
            assert list(pages(client, PAGES)) == [self.on_disk(page) for page in range(PAGES)]


@pytest.fixture
def device(serve: Serve, pools: Path, tmp_path: Path) -> Device:
    """One that may be written."""
    return Device(serve, pools, tmp_path, write="through")


def fails(call: Callable[[], object]) -> None:
    """It is EIO."""
    with pytest.raises(nbd.Error) as error:
        call()
    assert error.value.errnum == errno.EIO


def test_a_failed_read_is_an_error_of_its_pages_alone(device: Device) -> None:
    with device.server.client() as client:
        client.pread(PAGE, 0)
        wait_until(lambda: counters(device.pool).pages_in_tmem == 1, "a page to be put")
        with device.gate.failing(f"pread {100 * PAGE} {101 * PAGE}"):
            fails(lambda: client.pread(PAGE, 100 * PAGE))
            fails(lambda: client.pread(16 * PAGE, 90 * PAGE))
            assert client.pread(PAGE, 99 * PAGE) == compressible(99, 1)
            assert client.pread(PAGE, 101 * PAGE) == compressible(101, 1)
        with device.gate.failing("pread"):
            assert client.pread(PAGE, 0) == compressible(0, 1), "it is in tmem"
            fails(lambda: client.pread(PAGE, 200 * PAGE))
            fails(lambda: client.pwrite(b"part", 201 * PAGE + 5))
            client.pwrite(compressible(202, 2), 202 * PAGE)
        device.assert_is_source(client)


@pytest.mark.parametrize("in_tmem", [True, False])
def test_after_a_failed_write_a_page_is_what_the_source_holds(device: Device, in_tmem: bool) -> None:
    if in_tmem:
        read_all(device.server, device.pool, PAGES)
    with device.server.client() as client:
        data = b"".join(incompressible(page, 2) for page in range(2 * RUN))
        with device.gate.failing(f"pwrite {RUN * PAGE} {2 * RUN * PAGE}"):
            fails(lambda: client.pwrite(data, 0))
            fails(lambda: client.pwrite(b"part", (RUN + 5) * PAGE + 100))
            fails(lambda: client.zero(512, (RUN + 6) * PAGE))
            client.pwrite(incompressible(300, 2), 300 * PAGE)
        for page, version in ((0, 2), (RUN - 1, 2), (RUN, 1), (RUN + 5, 1), (RUN + 6, 1), (2 * RUN, 1)):
            assert device.on_disk(page) == (incompressible if version == 2 else compressible)(page, version)
        device.assert_is_source(client)
        with device.gate.failing("pwrite"):
            fails(lambda: client.pwrite(compressible(7, 3), 7 * PAGE))
            device.change(7, compressible(7, 4))  # what it may have left there
            assert client.pread(PAGE, 7 * PAGE) == compressible(7, 4)
        client.flush()
        device.assert_is_source(client)


def test_zeros_that_cannot_be_written_are_none(device: Device) -> None:
    read_all(device.server, device.pool, PAGES)
    with device.server.client() as client:
        with device.gate.failing("fallocate"):
            client.trim(8 * PAGE, 8 * PAGE)
        assert device.on_disk(8) == bytes(PAGE)
        device.assert_is_source(client)


def test_after_a_failed_sync_the_source_is_what_is_read(device: Device) -> None:
    with device.server.client() as client:
        client.pwrite(compressible(1, 2), PAGE)
        client.pwrite(bytes(PAGE), 2 * PAGE)
        read_page = [client.pread(PAGE, page * PAGE) for page in (1, 2)]
        assert read_page == [compressible(1, 2), bytes(PAGE)]
        wait_until(lambda: counters(device.pool).pages_in_tmem >= 1, "pages to be put")
        with device.gate.failing("fdatasync"):
            fails(client.flush)
        for page in (1, 2):
            device.change(page, compressible(page, 1))  # as a disk may that has lost the writes
        device.assert_is_source(client)
        fails(client.flush)
        fails(lambda: client.pwrite(compressible(3, 2), 3 * PAGE, nbd.CMD_FLAG_FUA))
        device.assert_is_source(client)
    wait_until(lambda: is_kept(device.pool), "the source to be known")
    assert counters(device.pool).pages_in_tmem > 0
    device.server.kill()
    device.server.start()
    assert counters(device.pool).pages_in_tmem == 0, "what is in tmem may not be in the source"
    with device.server.client() as client:
        device.assert_is_source(client)
        fails(client.flush)  # what the kernel has dropped no other sync writes


def test_short_reads_are_gone_on_with(device: Device) -> None:
    with device.gate.failing("short"), device.server.client() as client:
        device.assert_is_source(client)
    assert max(call.length for call in device.gate.calls("pread")) > PAGE


@pytest.mark.parametrize("write", ["no", "through"])
def test_of_a_source_that_is_cut_only_what_is_missing_is_an_error(
    serve: Serve, pools: Path, tmp_path: Path, write: str
) -> None:
    device = Device(serve, pools, tmp_path, write=write)
    with device.server.client() as client:
        hit = 400
        client.pread(PAGE, hit * PAGE)
        wait_until(lambda: counters(device.pool).pages_in_tmem == 1, "a page to be put")
        os.truncate(device.source, 256 * PAGE)
        assert client.pread(PAGE, hit * PAGE) == compressible(hit, 1)
        fails(lambda: client.pread(PAGE, 300 * PAGE))
        fails(lambda: client.pread(PAGE, 256 * PAGE))
        if write == "through":
            assert client.pread(PAGE, 255 * PAGE) == compressible(255, 1)
            client.pwrite(compressible(511, 2), 511 * PAGE)  # which makes it as long as it was
            assert client.pread(PAGE, 300 * PAGE) == bytes(PAGE)
        else:
            fails(lambda: client.pread(PAGE, 255 * PAGE))
        assert client.get_size() == PAGES * PAGE


def test_a_source_that_grows_is_served_as_long_as_it_was(device: Device) -> None:
    with device.server.client() as client:
        with device.source.open("ab") as file:
            file.write(compressible(PAGES, 1))
        device.assert_is_source(client)
        client.pwrite(compressible(PAGES - 1, 2), (PAGES - 1) * PAGE)
        assert device.on_disk(PAGES) == compressible(PAGES, 1)
        with pytest.raises(nbd.Error):
            client.pread(PAGE, PAGES * PAGE)


@pytest.mark.parametrize("how", ["rename", "replace", "unlink", "chmod"])
def test_a_golden_image_that_only_goes_elsewhere_is_what_it_was(
    serve: Serve, pools: Path, tmp_path: Path, how: str
) -> None:
    device = Device(serve, pools, tmp_path)
    new = tmp_path / "new"
    new.write_bytes(incompressible(0, 2) * PAGES)
    with device.server.client() as client:
        client.pread(64 * PAGE, 0)
        match how:
            case "rename":
                device.source.rename(tmp_path / "old")
            case "replace":
                new.replace(device.source)
            case "unlink":
                device.source.unlink()
            case _:
                device.source.chmod(0o400)
        assert list(pages(client, PAGES)) == [compressible(page, 1) for page in range(PAGES)]


@pytest.mark.parametrize("how", ["content", "times", "mapped times", "growth"])
def test_a_golden_image_that_is_changed_is_what_it_was_or_an_error(
    serve: Serve, pools: Path, tmp_path: Path, how: str
) -> None:
    device = Device(serve, pools, tmp_path)
    hits, misses = range(64), range(64, 128)
    with device.server.client() as client:
        client.pread(len(hits) * PAGE, 0)
        wait_until(lambda: counters(device.pool).pages_in_tmem == len(hits), "pages to be put")
        times = device.source.stat()
        if how == "growth":
            os.truncate(device.source, (PAGES + 1) * PAGE)
        elif how == "mapped times":
            with device.source.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                for page in (*hits, *misses):
                    memory[page * PAGE : (page + 1) * PAGE] = incompressible(page, 2)
        else:
            for page in (*hits, *misses):
                device.change(page, incompressible(page, 2))
        if how.endswith("times"):
            os.utime(device.source, ns=(times.st_atime_ns, times.st_mtime_ns))
        for page in hits:
            assert client.pread(PAGE, page * PAGE) == compressible(page, 1)
        for page in (*misses, PAGES - 1):
            fails(partial(client.pread, PAGE, page * PAGE))
        fails(lambda: client.pread(128 * PAGE, 0))
        client.cache(PAGES * PAGE, 0)
        assert client.pread(PAGE, 0) == compressible(0, 1)
    device.server.kill()
    device.server.start()
    assert counters(device.pool).pages_in_tmem == 0
    with device.server.client() as client:
        assert list(pages(client, PAGES)) == [device.on_disk(page) for page in range(PAGES)]
