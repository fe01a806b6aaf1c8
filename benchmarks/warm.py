# SPDX-License-Identifier: BSD-3-Clause
"""How long a guest that has moved waits for its pages, on a host that has none of them in RAM.

Two servers stand for two hosts, and an export of nbdkit's memory behind its delay filter for the backing that both
reach. A guest's pages lie in RAM on the first, which hands the device over; the second takes it at the first read, with
no list (cold) or with the list that tmemctl hot gave (warm). What the guest reads there, one request at a time: again
and again pages by chance, until nearly all come from RAM; or each page once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import nbd

from benchmarks.prefetch import far_disk
from tests.support import content, leftovers
from tests.support.harness import MIB, Control, Server, counters, device
from tmemd.store import hotlist, poolfile
from tmemd.store.requests import Request

PAGE: Final = content.PAGE
FIRST: Final = 2048
SLICE: Final = 500  # reads
BACK: Final = 0.95  # of a slice are hits: as good as before
LONGEST: Final = 60.0  # seconds that are waited for that
CORPUS: Final = 1024
LAYOUTS: Final = ("in runs", "scattered")
GOAL: Final = 3.0  # times as soon back with a list


@dataclass
class Found:
    """Of one way to move, in seconds and pages: medians of the rounds."""

    hot: str  # where the hot pages lie: side by side, or every other by chance
    list: bool  # whether there is one
    first_read: float = 0.0  # seconds, the take-over included
    seconds: float = 0.0  # until nearly all reads come from RAM
    misses: int = 0  # until then
    once: float = 0.0  # seconds that each page once takes
    fetched: int = 0  # ahead
    used: int = 0  # of these


def hot_pages(kind: str, n: int) -> list[int]:
    """So many pages of the device: side by side, or every other by chance."""
    if kind == "in runs":
        return list(range(FIRST, FIRST + n))
    return sorted(random.Random(1).sample(range(FIRST, FIRST + 2 * n), n))


class Hosts:
    """Two hosts that reach one backing."""

    def __init__(self, here: Path, pools: Path, backing: object, size: int) -> None:
        self._here, self._pools, self._keys = here, pools, (size, backing)
        self._servers: list[Server] = []

    def host(self, name: str, **keys: object) -> tuple[Server, Path]:
        """One that serves the device, or stands by; and its pool."""
        run, pools = self._here / name, self._pools / name
        run.mkdir()
        pools.mkdir()
        size, backing = self._keys
        server = Server(run, device("web", pools, size, backing, 2 * size, lease=12, timeout=4, standby="yes", **keys))
        self._servers.append(server)
        return server.start(), pools / "web.pool"

    def close(self) -> None:
        """End them."""
        for server in self._servers:
            server.kill()


def fill(client: nbd.NBD, pages: Sequence[int]) -> None:
    """Write them, as the guest does that swaps out."""
    for page in pages:
        client.pwrite(content.compressible(page % CORPUS, 1), page * PAGE)


def write_list(pool: Path, path: Path) -> None:
    """What tmemctl hot prints."""
    with pool.open("rb") as file:
        identity = poolfile.read_identity(file.fileno(), pool)
        assert identity
        path.write_bytes(msgspec.json.encode(hotlist.of_pool(file.fileno(), pool, identity)))


def read_until_back(client: nbd.NBD, pool: Path, pages: Sequence[int], found: Found) -> None:
    """Read by chance until a slice of the reads has nearly no miss."""
    rng, began, missed = random.Random(2), time.monotonic(), SLICE
    client.pread(PAGE, pages[0] * PAGE)
    found.first_read = time.monotonic() - began
    while missed > (1 - BACK) * SLICE and found.seconds < LONGEST:
        before = counters(pool).file_reads
        for page in rng.choices(pages, k=SLICE):
            client.pread(PAGE, page * PAGE)
        missed = counters(pool).file_reads - before
        found.misses += missed
        found.seconds = time.monotonic() - began


def read_once(client: nbd.NBD, pages: Sequence[int], found: Found) -> None:
    """Read each, in an order of chance, and hold it against what was written."""
    order, began = list(pages), time.monotonic()
    random.Random(3).shuffle(order)
    for page in order:
        if client.pread(PAGE, page * PAGE) != content.compressible(page % CORPUS, 1):
            raise RuntimeError(f"page {page} is wrong")
    found.once = time.monotonic() - began


@contextlib.contextmanager
def moved(found: Found, n: int, delay: float) -> Iterator[tuple[nbd.NBD, Path, list[int]]]:
    """A client of the second host, to which the device comes with the first read."""
    pages = hot_pages(found.hot, n)
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(leftovers.directory("/var/tmp"))
        pools = stack.enter_context(leftovers.directory("/dev/shm"))
        size = (FIRST + 3 * n) * PAGE
        backing = stack.enter_context(far_disk(here, delay, size + 16 * MIB))
        hosts = Hosts(here, pools, backing, size)
        stack.callback(hosts.close)
        first, pool = hosts.host("a")
        with first.client() as client:
            fill(client, pages)
        with Control(pool) as control:
            if control.request(Request.HANDOVER):
                raise RuntimeError("the handover failed")
        write_list(pool, here / "hot")
        second, pool = hosts.host("b", **({"warm": here / "hot"} if found.list else {}))
        yield stack.enter_context(second.client()), pool, pages


def measure(hot: str, n: int, delay: float, *, with_list: bool) -> Found:
    """Two moves: for reads by chance, and for each page once."""
    found = Found(hot, with_list)
    with moved(found, n, delay) as (client, pool, pages):
        read_until_back(client, pool, pages, found)
    with moved(found, n, delay) as (client, pool, pages):
        read_once(client, pages, found)
        found.fetched, found.used = counters(pool).prefetches, counters(pool).prefetch_hits
    return found


def median(found: Sequence[Found]) -> Found:
    """Of each number."""
    names = ("first_read", "seconds", "misses", "once", "fetched", "used")
    return replace(found[0], **{name: statistics.median(getattr(each, name) for each in found) for name in names})


def render(found: Sequence[Found]) -> str:
    """A table for people."""
    head = "hot pages     list  first read, s  back after, s  misses  each once, s  fetched    used"
    rows = (
        f"{each.hot:<13} {'yes' if each.list else 'no':<5}{each.first_read:>13.2f}{each.seconds:>15.2f}"
        f"{each.misses:>8.0f}{each.once:>14.2f}{each.fetched:>9.0f}{each.used:>8.0f}"
        for each in found
    )
    return "\n".join([head, *rows])


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/warm.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--pages", type=int, default=4096, help="that are hot (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.001, help="of the backing, in seconds (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; exit status 1 where a list gains too little."""
    args = parse_args()
    leftovers.sweep()
    found = []
    for hot in LAYOUTS:
        rounds = [
            [measure(hot, args.pages, args.delay, with_list=with_list) for with_list in (False, True)]
            for _ in range(args.rounds)
        ]
        found += [median(each) for each in zip(*rounds, strict=True)]
    print(json.dumps([asdict(each) for each in found], indent=1) if args.json else render(found))
    gains = [cold.seconds / warm.seconds for cold, warm in zip(found[::2], found[1::2], strict=True)]
    return 0 if min(gains) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
