# SPDX-License-Identifier: BSD-3-Clause
"""No memory to be had: a full tmpfs and a memory cgroup near its limit refuse puts, and nobody dies."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbd
import pytest

from tests.support.cgroup import Cgroup, memory_cgroup
from tests.support.content import PAGE, incompressible
from tests.support.harness import MIB, Serve, Server, counters, device
from tests.support.writers import pages
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.poolfile import BLOCK_PAGES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and making cgroups needs root")

PAGES = 4096


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 6 MiB."""
    directory = tmp_path / "tmpfs"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A memory cgroup with room for nbdkit and a few MiB more."""
    with memory_cgroup(128 * MIB) as group:
        yield group


def write_all(server: Server) -> None:
    """Write pages nobody can compress, all over the device."""
    with server.client() as client:
        for first in range(0, PAGES, 64):
            client.pwrite(b"".join(incompressible(page, 1) for page in range(first, first + 64)), first * PAGE)


def verify_all(server: Server) -> None:
    """Every page holds what `write_all` wrote."""
    with server.client() as client:
        assert [n for n, data in enumerate(pages(client, PAGES)) if data != incompressible(n, 1)] == []


def fill(directory: Path) -> None:
    """Take all that is left of a file system."""
    with (directory / "filler").open("wb") as file:
        left = os.statvfs(directory)
        os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_bsize)


def test_invariant_4_a_full_tmpfs_refuses_puts(serve: Serve, small_tmpfs: Path, disk: Path) -> None:
    server = serve(device("full", small_tmpfs, PAGES * PAGE, disk, "32M"))
    write_all(server)
    verify_all(server)
    now = counters(small_tmpfs / "full.pool")
    assert now.puts_refused > 0
    assert now.pages_in_tmem > 0
    assert now.io_errors == 0


def test_invariant_4_a_tmpfs_filled_by_others_refuses_puts_and_reads_work(
    serve: Serve, small_tmpfs: Path, disk: Path
) -> None:
    server = serve(device("full", small_tmpfs, PAGES * PAGE, disk, "32M"))
    fill(small_tmpfs)
    with server.client() as client:
        assert not any(any(data) for data in pages(client, PAGES))
    write_all(server)
    verify_all(server)
    server.kill()
    server.start()
    verify_all(server)


def test_a_device_whose_limit_has_room_for_its_index_and_little_more_takes_writes_all_over(
    serve: Serve, pools: Path, disk: Path
) -> None:
    size = 4096 * MIB
    server = serve([*device("least", pools, size, disk, str(_core.layout(size).minimum_bytes)), "reserve=no"])
    spread = range(0, size // PAGE, BLOCK_PAGES)
    with server.client() as client:
        for page in spread:
            client.pwrite(incompressible(page, 1), page * PAGE)
        assert [page for page in spread if client.pread(PAGE, page * PAGE) != incompressible(page, 1)] == []
    now = counters(pools / "least.pool")
    assert now.index_bytes == len(spread) * PAGE
    assert now.used_bytes <= now.limit_bytes


@pytest.mark.parametrize("less", [0, 1])
def test_a_limit_without_room_for_the_whole_index_is_refused(serve: Serve, pools: Path, disk: Path, less: int) -> None:
    least = _core.layout(64 * MIB).minimum_bytes
    parameters = device("least", pools, 64 * MIB, disk, str(least - less))
    if not less:
        serve(parameters)
        return
    with pytest.raises(AssertionError, match=f"below the {least} bytes"):
        serve(parameters)


def test_invariant_4_a_pool_without_statistics_on_a_full_tmpfs_is_an_error_not_sigbus(
    serve: Serve, small_tmpfs: Path, disk: Path
) -> None:
    server = serve(device("full", small_tmpfs, PAGES * PAGE, disk, "32M"))
    assert server.stop() == 0
    hole = f"--offset={poolfile.STATISTICS_OFFSET}", f"--length={poolfile.PAGE}"
    subprocess.run(["fallocate", "--punch-hole", *hole, small_tmpfs / "full.pool"], check=True)
    fill(small_tmpfs)
    with pytest.raises(AssertionError, match="No space left on device"):
        server.start()


def test_a_tmpfs_with_no_room_for_a_pool_is_named(serve: Serve, small_tmpfs: Path, disk: Path) -> None:
    fill(small_tmpfs)
    with pytest.raises(AssertionError, match=r"error: .*/full\.pool: No space left on device"):
        serve(device("full", small_tmpfs, PAGES * PAGE, disk, "32M"))


def test_invariant_4_ram_only_on_a_full_tmpfs_is_eio_not_sigbus(serve: Serve, small_tmpfs: Path) -> None:
    server = serve(device("full", small_tmpfs, PAGES * PAGE, "none", "32M"))
    fill(small_tmpfs)
    with pytest.raises(nbd.Error, match="Input/output error"):
        write_all(server)
    with server.client() as client:
        assert client.pread(PAGE, (PAGES - 1) * PAGE) == bytes(PAGE)
    assert server.alive()


def test_invariant_4_a_cgroup_near_its_limit_refuses_puts(
    serve: Serve, pools: Path, disk: Path, cgroup: Cgroup
) -> None:
    server = serve(device("group", pools, "512M", disk, "1G"), wrapper=cgroup.wrapper())
    try:
        with server.client() as client:
            for first in range(0, 65536, 64):
                client.pwrite(b"".join(incompressible(page, 1) for page in range(first, first + 64)), first * PAGE)
            for first in range(0, 65536, 1024):
                assert client.pread(PAGE, first * PAGE) == incompressible(first, 1)
        assert server.alive()
        assert cgroup.kills() == 0
        now = counters(pools / "group.pool")
        assert now.puts_refused > 0
        assert now.pages_in_tmem > 0
        assert now.used_bytes < cgroup.limit
    finally:
        server.kill()
        (pools / "group.pool").unlink()  # its memory is charged to the cgroup, which could not be removed before


def test_invariant_4_many_devices_near_a_cgroups_limit_do_not_pass_it_together(
    serve: Serve, pools: Path, tmp_path: Path
) -> None:
    names = [f"d{n}" for n in range(64)]

    def write(server: Server, name: str, version: int) -> None:
        """Version 0 takes what memory nbdkit itself needs, and next to none for pages."""
        with server.client(name) as client:
            for first in range(0, 2048, 64):
                data = (
                    b"".join(incompressible(page, 1) for page in range(first, first + 64))
                    if version
                    else b"x" * (64 * PAGE)
                )
                client.pwrite(data, first * PAGE)

    with memory_cgroup(200 * MIB) as group:
        parameters = [key for name in names for key in device(name, pools, 8 * MIB, tmp_path / name, 16 * MIB)]
        server = serve(parameters, options=("--threads", "2"), wrapper=group.wrapper())
        try:
            with ThreadPoolExecutor(16) as writers:
                for version in range(2):
                    list(writers.map(write, [server] * len(names), names, [version] * len(names)))
            assert server.alive()
            assert group.kills() == 0
            assert sum(counters(pools / f"{name}.pool").puts_refused for name in names) > 0
        finally:
            server.kill()
            for name in names:
                (pools / f"{name}.pool").unlink()
