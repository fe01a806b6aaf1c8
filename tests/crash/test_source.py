# SPDX-License-Identifier: BSD-3-Clause
"""Who attaches to a cache device finds what its source says, whatever was killed or changed before."""

from __future__ import annotations

import mmap
import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible, content, incompressible
from tests.support.gate import Gate
from tests.support.harness import MIB, Control, Door, Serve, cache_device, counters, wait_until
from tests.support.sources import image, is_kept, read_all
from tests.support.vhost.disk import Disk
from tests.support.writers import Ledger, Writers, pages
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import open_device
from tmemd.store.requests import Request

PAGES = 512
CYCLES = 24
both_doors = pytest.mark.parametrize("door", ["nbd", "vhost"])


def wait_until_kept(pool: Path) -> None:
    """Return when whoever attaches next would adopt the pool, if nothing changed."""
    wait_until(lambda: is_kept(pool), "the source to be known")


def wait_until_settled(source: Path) -> None:
    """Return when its times are so old that they tell of every change."""
    wait_until(lambda: time.time() - source.stat().st_ctime > 1, "times to be old")


def change(source: Path, page: int, data: bytes) -> None:
    """Write to the source."""
    with source.open("r+b") as file:
        os.pwrite(file.fileno(), data, page * PAGE)


def put_back_times(source: Path, before: os.stat_result) -> None:
    """Let it seem as if nothing was written."""
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_secretly(source: Path) -> None:
    """Change a page, and put the times back."""
    before = source.stat()
    change(source, 7, incompressible(7, 2))
    put_back_times(source, before)


def replace(source: Path) -> None:
    """Put another file in its place, with the same times."""
    before, other = source.stat(), source.with_suffix(".new")
    image(other, PAGES, 2)
    put_back_times(other, before)
    other.rename(source)


def write_behind(source: Path) -> None:
    """Make it longer."""
    with source.open("ab") as file:
        file.write(compressible(PAGES, 1)[:512])


def cut(source: Path) -> None:
    """Make it shorter, not to whole pages."""
    os.truncate(source, 100 * PAGE + 512)


def map_and_change(source: Path) -> None:
    """Change it through a mapping."""
    with source.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[7 * PAGE : 8 * PAGE] = incompressible(7, 2)
        memory.flush()


@pytest.mark.parametrize("write", ["no", "through"])
@pytest.mark.parametrize(
    "somebody", [change_secretly, replace, write_behind, cut, map_and_change], ids=lambda function: function.__name__
)
def test_what_somebody_else_wrote_is_not_hidden(
    serve: Serve, pools: Path, tmp_path: Path, write: str, somebody: Callable[[Path], None]
) -> None:
    source, pool = image(tmp_path / "image", PAGES), pools / "golden.pool"
    server = serve(cache_device("golden", pools, source, 8 * MIB, write=write))
    read_all(server, pool, PAGES)
    wait_until_kept(pool)
    server.kill()
    somebody(source)
    wait_until_settled(source)
    for _ in range(2):
        server.start()
        with server.client() as client:
            found = client.pread(client.get_size(), 0)
        assert found == source.read_bytes()
        server.kill()


@pytest.mark.parametrize("write", ["no", "through"])
def test_pages_are_kept_while_the_source_is_what_it_was(serve: Serve, pools: Path, tmp_path: Path, write: str) -> None:
    source, pool = image(tmp_path / "image", PAGES), pools / "golden.pool"
    server = serve(cache_device("golden", pools, source, 8 * MIB, write=write))
    read_all(server, pool, PAGES)
    wait_until_kept(pool)
    server.kill()
    assert source.read_bytes()
    server.start()
    before = counters(pool)
    assert before.pages_in_tmem == PAGES
    read_all(server, pool, PAGES)
    assert counters(pool).file_reads == before.file_reads


def test_a_block_device_s_pages_are_never_kept(serve: Serve, pools: Path, tmp_path: Path, loop_device: Path) -> None:
    n_pages, pool = 2 * MIB // PAGE, pools / "golden.pool"
    with loop_device.open("r+b") as file:
        file.write(b"".join(compressible(page, 1) for page in range(n_pages)))
        os.fsync(file.fileno())
    wait_until_settled(loop_device)
    server = serve(cache_device("golden", pools, loop_device, 8 * MIB, write="through"))
    read_all(server, pool, n_pages)
    with Control(pool) as control:
        assert control.request(Request.COMPACT) == 0  # the maintenance has looked at it
    server.kill()
    change(tmp_path / "loop", 0, incompressible(0, 2))  # not through the device, whose node tells nothing of it
    server.start()
    with server.client() as client:
        assert client.pread(PAGE, 0) == incompressible(0, 2)
        assert client.pread(PAGE, PAGE) == compressible(1, 1)


def test_after_host_death_there_is_a_new_pool(pools: Path, tmp_path: Path) -> None:
    source, boot_id = image(tmp_path / "image", PAGES), tmp_path / "root/proc/sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    config = DeviceConfig("golden", PAGES * PAGE, None, 8 * MIB, pools, source=source)

    def pages_found() -> int:
        with closing(open_device(config, root=tmp_path / "root")) as served:
            found = counters(served.pool_path).pages_in_tmem
            _core.pread(served.core, bytearray(PAGES * PAGE), 0, 0)
            wait_until(lambda: counters(served.pool_path).pages_in_tmem == PAGES, "pages to be put")
            served.start()
            wait_until_kept(served.pool_path)
            return found

    for _ in range(2):
        boot_id.write_text(f"{uuid.uuid4()}\n")
        assert [pages_found(), pages_found()] == [0, PAGES]


@both_doors
@pytest.mark.parametrize("case", [("pwrite", 1, PAGES - 1), ("done", 2, 0)], ids=["before", "after"])
def test_a_kill_amid_a_write_leaves_what_the_source_says(
    serve: Serve, pools: Path, tmp_path: Path, case: tuple[str, int, int], door: Door
) -> None:
    moment, version, kept = case
    source, pool = image(tmp_path / "image", PAGES), pools / "golden.pool"
    gate = Gate(tmp_path, source)
    server = serve(cache_device("golden", pools, source, 8 * MIB, write="through"), wrapper=gate.wrapper, door=door)
    read_all(server, pool, PAGES)
    wait_until_kept(pool)
    with gate.closed(moment):
        client = server.connect()
        if isinstance(client, Disk):
            client.submit_write(compressible(7, 2), 7 * PAGE)
        else:
            client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(compressible(7, 2))), 7 * PAGE)
            client.poll(0)
        gate.wait_for(1, "the write to be held up")
        server.kill()
    server.start()
    assert counters(pool).pages_in_tmem == kept
    with server.client() as client:
        for page, data in enumerate(pages(client, PAGES)):
            assert data == compressible(page, version if page == 7 else 1)


def change_some(source: Path, ledger: Ledger, rng: random.Random) -> None:
    """Somebody else writes to the source, and puts its times back."""
    before = source.stat()
    for page in rng.sample(range(PAGES), 5):
        ledger.under_way.pop(page, None)
        ledger.acknowledged[page] = ledger.next_version()
        change(source, page, content(page, ledger.acknowledged[page]))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@both_doors
def test_sigkill_at_any_moment_hides_nothing_that_anybody_wrote(
    serve: Serve, pools: Path, tmp_path: Path, door: Door
) -> None:
    source, pool, ledger = tmp_path / "image", pools / "golden.pool", Ledger(PAGES)
    source.write_bytes(bytes(PAGES * PAGE))
    server = serve(cache_device("golden", pools, source, MIB, write="through"), door=door)
    adopted = 0
    for cycle in range(CYCLES):
        rng = random.Random(cycle)
        if cycle % 3:
            wait_until_kept(pool)
        if cycle % 3 != 1:
            writers = Writers(ledger, cycle, server.connect)
            ledger.wait_for(rng.randrange(1, 60), writers.stop)
            server.kill()
            writers.join()
        server.kill()
        if rng.random() < 0.3:
            change_some(source, ledger, rng)
        server.start()
        adopted += counters(pool).pages_in_tmem > 0
        with server.client() as client:
            ledger.verify(client)
        now = counters(pool)
        assert (now.bad_checksums, now.io_errors) == (0, 0)
    assert adopted
