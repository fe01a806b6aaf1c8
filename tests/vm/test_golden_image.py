"""Two guests boot from one golden image, each with an overlay of its own: what one has read, the other finds in RAM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lz4.block
import pytest

from tests.support import blocktrace, uml
from tests.support.content import PAGE
from tests.support.harness import MIB, ROOT, Serve, counters, taken
from tests.support.verdict import second_chance

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


def test_the_second_guest_boots_from_tmem(serve: Serve, pools: Path, disks: Path, tmp_path: Path) -> None:
    uml.make(str(IMAGE.relative_to(ROOT)), "build/ptrace.so")
    log, guests, pool = tmp_path / "log", disks / "guests", pools / "golden.pool"
    guests.mkdir()
    parameters = ["name=golden", f"source={IMAGE}", f"limit={LIMIT}", f"pools={pools}", f"logfile={log}"]
    server = serve(parameters, ("-r", "--filter=log"))
    boot(server.socket, guests)
    first = counters(pool)
    boot(server.socket, guests)
    second = counters(pool)
    gets, file_reads = second.gets - first.gets, second.file_reads - first.file_reads
    print(f"the first guest: {first.gets} pages from tmem, {first.file_reads} read; the second: {gets}, {file_reads}")
    assert gets >= 0.9 * (gets + file_reads) > 0
    read = {page for each in blocktrace.logged(log.read_text().splitlines()) for page in each.covers()}
    once = compressed(read)
    print(f"{len(read)} pages read: {once / MIB:.1f} MiB compressed; the pool takes {taken(pool) / MIB:.1f} MiB")
    assert second.payload_bytes <= once
    assert taken(pool) <= 1.25 * once + second.minimum_bytes
