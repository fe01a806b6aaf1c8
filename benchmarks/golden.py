"""Boot guests from one golden image (User-Mode Linux, qcow2 overlays): from tmem, from the host's page cache, uncached.

For each way the image begins cold. Printed for each guest: the seconds from its start until systemd says that all is
running, the milliseconds that its reads took by then, as its kernel counts them (added up, also where several are under
way), and the RAM of the host that then holds the image.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support import leftovers, uml
from tests.support.harness import MIB, PLUGIN, ROOT, environment, taken, wait_until

IMAGE: Final = ROOT / "build/vm/root.img"
# The fourth word is the time of reads, in milliseconds.
SCRIPT: Final = """systemctl is-system-running --wait
read uptime rest </proc/uptime
set -- $(cat /sys/block/vda/stat)
echo "up $uptime $4" """
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
def serving(way: Way, directory: Path, pools: Path) -> Iterator[Path]:
    """Serve the image that way for the length of a with block; yields the socket."""
    socket = directory / "nbd.sock"
    command = [each.format(socket=socket, pools=pools) for each in way.command]
    with subprocess.Popen(leftovers.dying_with_us(command), env=environment()) as server:
        try:
            wait_until(lambda: socket.exists() or server.poll() is not None, "the server")
            yield socket
        finally:
            server.kill()


def measure(way: Way, guests: int) -> Iterator[str]:
    """A row of the table for each of the guests, which boot one after the other."""
    with leftovers.directory("/var/tmp") as directory, leftovers.directory("/dev/shm") as pools:
        forget()
        with serving(way, directory, pools) as socket:
            for guest in range(1, guests + 1):
                own = directory / f"guest{guest}"
                said = uml.boot_from(socket, "", own, script=SCRIPT, memory="256M", seconds=SECONDS)
                (words,) = re.findall(r"up (\S+) (\d+)", said)
                yield f"| {way.name} | {guest} | {' | '.join(words)} | {way.ram(pools) / MIB:.1f} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=2, help="one after the other (default: %(default)s)")
    args = parser.parse_args()
    uml.make(str(IMAGE.relative_to(ROOT)), "build/ptrace.so")
    rows = [row for way in WAYS for row in measure(way, args.guests)]
    print(
        "| image from | guest | up after, s | reads, ms | host RAM, MiB |",
        "| --- |" + " ---: |" * 4,
        *rows,
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
