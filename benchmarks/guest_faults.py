# SPDX-License-Identifier: BSD-3-Clause
"""How long a guest waits for a page that it has swapped out, by either door: one guest of QEMU, a device by each.

The guest swaps on one device and on the other in turn, several times. It pushes pages of a program out, which then
touches them in any order; timed are the touches that the guest's kernel counts as major faults. Without KVM (TCG) the
guest's own part of each is about ten times what it would be.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

from tests.support import leftovers
from tests.support.harness import MIB, ROOT, Door, Server, device

DOORS: Final[tuple[Door, ...]] = ("nbd", "vhost")
SIZE: Final = 256 * MIB
SECONDS: Final = 600  # a guard against a hang


def serve(door: Door, undo: ExitStack) -> Server:
    """A device called as its door, in a process of its own."""
    pools, run = (undo.enter_context(leftovers.directory(place)) for place in ("/dev/shm", "/var/tmp"))
    server = Server(run, device(door, pools, SIZE, run / "backing", 2 * SIZE), door=door)
    undo.callback(server.kill)
    return server.start()


def boot(nbd: Path, vhost: Path, arguments: list[str]) -> str:
    """What a guest says that has both and does guest-faults with these *arguments*."""
    node = f"-blockdev driver=nbd,node-name=nbd,server.type=unix,server.path={nbd},export=nbd,discard=unmap"
    command: list[str | Path] = [
        "timeout", str(SECONDS), ROOT / "scripts/boot-guest", "--cpus", "1", "--attach", "vhost",
        "--qemu", f"{node} -device virtio-blk-pci,drive=nbd,serial=nbd", vhost,
        "benchmarks/guest-faults", ROOT / "build/faults", *arguments, *DOORS,
    ]  # fmt: skip
    done = subprocess.run(
        leftovers.all_dying_with_us(command), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.decode(errors="replace")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pages", type=int, default=10_000, help="that are pushed out and touched (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    args = parser.parse_args()
    source = ROOT / "benchmarks/faults.c"
    subprocess.run(["cc", "-O2", "-static", "-o", ROOT / "build/faults", source], check=True)
    with ExitStack() as undo:
        nbd, vhost = (serve(door, undo) for door in DOORS)
        said = boot(nbd.socket, vhost.vhost, [str(args.pages), str(args.rounds)])
    if "guest: dmesg is clean" not in said:
        sys.exit(said)
    print("| door | major faults | p50, us | p90 | p99 |\n| --- | ---: | ---: | ---: | ---: |")
    for door in DOORS:
        rows = [list(map(float, row)) for row in re.findall(rf"faults: {door} (\S+) (\S+) (\S+) (\S+)", said)]
        count, *columns = zip(*rows, strict=True)
        cells = [f"{median(column):.0f} ({min(column):.0f} to {max(column):.0f})" for column in columns]
        print(f"| {door} | {sum(count):.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
