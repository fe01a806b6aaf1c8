# SPDX-License-Identifier: BSD-3-Clause
"""Boot guests from one golden image (User-Mode Linux, qcow2 overlays): from tmem, from the host's page cache, uncached.

For each way the image begins cold. Printed are

- for each guest, the seconds from its start until systemd says that all is running, and the RAM of the host that then
  holds the image;
- milliseconds that the reads of such a boot take by themselves, one after the other, cold and once more: of several
  rounds, in each of which every way has its turn, the median and the range.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.record_blocktrace import logging
from tests.support import blocktrace, leftovers, uml
from tests.support.blocktrace import PAGE, Access
from tests.support.harness import MIB, PLUGIN, ROOT, connect, environment, taken, wait_until

IMAGE: Final = ROOT / "build/vm/root.img"
SCRIPT: Final = "systemctl is-system-running --wait && echo up $(cut -d' ' -f1 /proc/uptime)"
SECONDS: Final = 300  # a guard against a hang
LIMIT: Final = 256 * MIB


@dataclass(frozen=True)
class Way:
    """How the image is served."""

    name: str
    command: tuple[str, ...]  # with {socket} and {pools} to be filled in

    def ram(self, pools: Path) -> int:
        """Bytes of the host's RAM that hold the image."""
        pool = pools / "golden.pool"
        return page_cache() + (taken(pool) if pool.exists() else 0)


_NBDKIT: Final = ("nbdkit", "-f", "-r", "-U", "{socket}")
_DEVICE: Final = ("name=golden", f"source={IMAGE}", f"limit={LIMIT}", "pools={pools}")
WAYS: Final = (
    Way("tmem", (*_NBDKIT, "python", str(PLUGIN), *_DEVICE)),
    Way("page cache", (*_NBDKIT, "file", str(IMAGE))),
    Way("uncached", ("qemu-nbd", "-r", "-t", "-e", "0", "--cache=none", "-f", "raw", "-k", "{socket}", str(IMAGE))),
)


def page_cache() -> int:
    """Bytes of the image in the host's page cache."""
    said = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", IMAGE], capture_output=True, check=True
    )
    return int(said.stdout)


def forget() -> None:
    """Have the page cache drop the image."""
    fd = os.open(IMAGE, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@contextlib.contextmanager
def serving(way: Way) -> Iterator[tuple[Path, Path]]:
    """Serve the cold image that way for the length of a with block; yields the socket, and where its pool is."""
    forget()
    with leftovers.directory("/dev/shm") as pools:
        socket = pools / "nbd.sock"
        command = [each.format(socket=socket, pools=pools) for each in way.command]
        with subprocess.Popen(leftovers.dying_with_us(command), env=environment()) as server:
            try:
                wait_until(lambda: socket.exists() or server.poll() is not None, "the server")
                yield socket, pools
            finally:
                server.kill()


def boot(socket: Path, directory: Path) -> float:
    """Boot a guest; returns the seconds until it was up."""
    said = uml.boot_from(socket, "", directory, script=SCRIPT, memory="256M", seconds=SECONDS)
    (up,) = re.findall(r"up (\S+)", said)
    return float(up)


def boots(way: Way, directory: Path, guests: int) -> Iterator[str]:
    """A row of the table for each of the guests, which boot one after the other."""
    with serving(way) as (socket, pools):
        for guest in range(1, guests + 1):
            up = boot(socket, directory / f"{way.name}-{guest}".replace(" ", "-"))
            yield f"| {way.name} | {guest} | {up:.1f} | {way.ram(pools) / MIB:.1f} |"


def reads_of_a_boot(directory: Path) -> list[Access]:
    """What a guest reads of the image."""
    with logging(directory, IMAGE, "-r") as socket:
        boot(socket, directory / "guest")
    return list(blocktrace.logged((directory / "log").read_text().splitlines()))


def replay(socket: Path, reads: Sequence[Access]) -> float:
    """Make the reads; returns the milliseconds it took."""
    handle = connect(socket)
    start = time.perf_counter()
    for each in reads:
        handle.pread(each.pages * PAGE, each.page * PAGE)
    ms = 1000 * (time.perf_counter() - start)
    handle.shutdown()
    return ms


def replays(directory: Path, rounds: int) -> Iterator[str]:
    """A row of the table for each way."""
    reads = reads_of_a_boot(directory)
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in WAYS}
    for way in WAYS * rounds:
        with serving(way) as (socket, _):
            times[way.name].append((replay(socket, reads), replay(socket, reads)))
    for name, pairs in times.items():
        cells = (f"{median(each):.0f} ({min(each):.0f} to {max(each):.0f})" for each in zip(*pairs, strict=True))
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=2, help="one after the other (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of reads (default: %(default)s)")
    args = parser.parse_args()
    uml.make(str(IMAGE.relative_to(ROOT)), "build/ptrace.so")
    with leftovers.directory("/var/tmp") as directory:
        by_boots = [row for way in WAYS for row in boots(way, directory, args.guests)]
        by_reads = list(replays(directory, args.rounds))
    print("| image from | guest | up after, s | host RAM, MiB |", "| --- | ---: | ---: | ---: |", *by_boots, sep="\n")
    print("\n| reads of a boot from | cold, ms | again, ms |", "| --- | ---: | ---: |", *by_reads, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
