# SPDX-License-Identifier: BSD-3-Clause
"""Two guests boot from one golden image, each with an overlay of its own: what one has read, the other finds in RAM."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lz4.block
import pytest

from tests.support import blocktrace, uml
from tests.support.content import PAGE
from tests.support.harness import MIB, ROOT, Serve, counters, taken, wait_until
from tests.support.verdict import second_chance
from tmemd.store.poolfile import Counters

IMAGE = ROOT / "build/vm/root.img"
SECONDS = 300  # a guard against a hang; a boot takes fifteen
LIMIT = 256 * MIB  # far more than a boot reads

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(1200),
    *uml.needs_uml,
]


def boot(server: Path, directory: Path) -> None:
    """Have a guest boot until systemd says that all is running, and power off."""

    def run() -> str:
        overlay = directory / f"guest{len(list(directory.iterdir()))}"
        script = "systemctl is-system-running --wait"
        return uml.boot_from(server, "golden", overlay, script=script, memory="256M", seconds=SECONDS)

    assert "running\r\n" in second_chance(run)


def compressed(pages: Iterable[int]) -> int:
    """What these pages of the image take, in bytes."""
    with IMAGE.open("rb") as image:

        def content(page: int) -> bytes:
            image.seek(page * PAGE)
            return image.read(PAGE)

        contents = filter(any, map(content, pages))
        return sum(min(PAGE, len(lz4.block.compress(each, store_size=False))) for each in contents)


def from_tmem(before: Counters, after: Counters) -> float:
    """The share of the pages read between two moments that were in tmem."""
    gets, file_reads = after.gets - before.gets, after.file_reads - before.file_reads
    print(f"{gets} pages from tmem, {file_reads} from the image")
    return gets / (gets + file_reads)


def test_guests_boot_from_what_one_has_read(serve: Serve, pools: Path, disks: Path, tmp_path: Path) -> None:
    """Also when the server is killed meanwhile."""
    uml.make(str(IMAGE.relative_to(ROOT)), "build/ptrace.so")
    log, guests, pool = tmp_path / "log", disks / "guests", pools / "golden.pool"
    guests.mkdir()
    parameters = ["name=golden", f"source={IMAGE}", f"limit={LIMIT}", f"pools={pools}", f"logfile={log}"]
    server = serve(parameters, ("-r", "--filter=log"))

    boot(server.socket, guests)
    first = counters(pool)
    boot(server.socket, guests)
    second = counters(pool)
    kept = first.promotions / first.file_reads  # less than all, on a busy machine: of long reads copies are dropped
    assert kept >= 0.5
    assert from_tmem(first, second) >= 0.9 * min(1, kept)
    read = {page for each in blocktrace.logged(log.read_text().splitlines()) for page in each.covers()}
    once = compressed(read)
    print(f"{len(read)} pages read: {once / MIB:.1f} MiB compressed; the pool takes {taken(pool) / MIB:.1f} MiB")
    assert second.payload_bytes <= once
    assert taken(pool) <= 1.25 * once + second.minimum_bytes

    with ThreadPoolExecutor() as threads:
        third = threads.submit(boot, server.socket, guests)
        wait_until(lambda: third.done() or counters(pool).gets > second.gets + 1000, "the third guest to boot")
        server.kill()
        server.start()
        third.result()
    assert from_tmem(second, counters(pool)) >= 0.9
