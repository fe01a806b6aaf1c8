# SPDX-License-Identifier: BSD-3-Clause
"""What a cache device costs: reads that hit beside a swap device's, reads that miss beside nbdkit's file plugin.

A read that misses goes to the same file on the same disk as nbdkit's, which is told to keep nothing of it in the page
cache; each page is read once, from a pool that is empty. Then the same pages are read again, from tmem, and from a
swap device that holds them. Rounds in turn, ratios within a round. Content is pages of live processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import pages, peers
from benchmarks.peers import ROOT, Peer, Place, Server, serving
from benchmarks.report import Spread
from tests.support.harness import counters

HERE: Final = Path(__file__).resolve().parent
MIB: Final = 1 << 20
GOAL: Final = 1.05  # of the time that nbdkit's file plugin takes, for a miss
# Name, fio's kind of access, size of a request, how many at a time.
LOADS: Final = (("4k 1", "randread", "4k", 1), ("4k 16", "randread", "4k", 16), ("128k 1", "read", "128k", 1))


def seconds_for(server: Server, size: int, access: str, block: str, depth: int) -> float:
    """How long fio takes to read every byte once."""
    command = [
        "fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={server.socket}", f"--rw={access}",
        f"--bs={block}", f"--iodepth={depth}", f"--size={size}", "--randrepeat=1", "--output-format=json",
    ]  # fmt: skip
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    read: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    if read["io_bytes"] != size:
        raise RuntimeError(f"fio read {read['io_bytes']} of {size} bytes")
    return float(read["runtime"]) / 1000


def cache_peer(place: Place, source: Path, size: int) -> Peer:
    """A cache device of the source, with room for all of it."""
    device = ["name=cache", f"source={source}", f"limit={2 * size}", f"pools={place.pools}"]
    return Peer("cache", ["python", str(ROOT / "plugin/tmem.py"), *device], keeps=False)


def file_peer(source: Path) -> Peer:
    """Nbdkit's file plugin, as near to O_DIRECT as it comes: nothing is read ahead, and nothing is kept."""
    return Peer("file", ["file", str(source), "cache=none", "fadvise=random"], keeps=False)


@contextlib.contextmanager
def empty_cache(place: Place, source: Path, size: int) -> Iterator[Server]:
    """A cache device that holds nothing yet."""
    pool = place.pools / "cache.pool"
    pool.unlink(missing_ok=True)
    with serving(cache_peer(place, source, size), place) as server:
        yield server


def drop_page_cache(source: Path) -> None:
    """Leave nothing of the file in the host's page cache."""
    subprocess.run(["dd", f"if={source}", "iflag=nocache", "count=0"], check=True, stderr=subprocess.DEVNULL)


def one_round(place: Place, source: Path, swap: Server, size: int) -> dict[str, float]:
    """Ratios of times, by load."""
    ratios = {}
    for name, access, block, depth in LOADS:
        drop_page_cache(source)
        with serving(file_peer(source), place) as server:
            file = seconds_for(server, size, access, block, depth)
        drop_page_cache(source)
        with empty_cache(place, source, size) as server:
            miss = seconds_for(server, size, access, block, depth)
            found = counters(place.pools / "cache.pool")
            ratios[f"put {name}"] = found.promotions / (size // 4096)
            if found.gets:
                raise RuntimeError(f"{found.gets} pages were read twice")
            while counters(place.pools / "cache.pool").pages_in_file:
                seconds_for(server, size, "read", "128k", 1)
            hit = seconds_for(server, size, access, block, depth)
        ratios[f"miss {name}"] = miss / file
        ratios[f"hit {name}"] = hit / seconds_for(swap, size, access, block, depth)
    return ratios


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/cache_device.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--mib", type=int, default=256, help="size of the source (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: where temporary files go)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; the exit status is 1 if a miss costs more than it may."""
    args = parse_args()
    size = args.mib * MIB
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        place = Place(Path("-"), args.corpus or Path(memory) / "corpus", Path(disk), Path(memory))
        if not args.corpus:
            pages.capture(place.corpus, 16384)
        content, source = place.corpus.read_bytes(), Path(disk) / "source"
        with source.open("wb") as file:
            while (left := size - file.tell()) > 0:
                file.write(content[:left])
        subprocess.run(["sync", source], check=True)
        with serving(peers.ours(place, size), place) as swap:
            fill = ["nbdcopy", str(source), f"nbd+unix:///?socket={swap.socket}"]
            subprocess.run(fill, check=True)
            rounds = [one_round(place, source, swap, size) for _ in range(args.rounds)]
    spreads = {name: Spread.of([each[name] for each in rounds]) for name in rounds[0]}
    if args.json:
        print(json.dumps({name: vars(spread) for name, spread in spreads.items()}, indent=1))
    else:
        table = Table("", *(name for name, *_ in LOADS))
        for what, title in (
            ("miss", "miss, of file's time"),
            ("put", "misses put at once"),
            ("hit", "hit, of swap's"),
        ):
            table.add_row(title, *(str(spreads[f"{what} {name}"]) for name, *_ in LOADS))
        Console().print(table)
    return int(any(spreads[f"miss {name}"].median > GOAL for name, *_ in LOADS))


if __name__ == "__main__":
    sys.exit(main())
