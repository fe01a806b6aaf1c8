# SPDX-License-Identifier: BSD-3-Clause
"""What random trims leave of a pool: puts refused, memory taken (against zram's), and what compaction costs.

Devices without a backing file or maintenance; compacting is one call of the core. One with room for all its pages is
filled, trimmed at random, compacted, and filled again; zram gets the same pages and trims, and is told to compact. One
whose limit holds a part of its pages is filled to it, trimmed, and, without settling, filled again with pages of other
sizes. At the end, the time of a move of compaction in a small and in a large pool.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks import pages, zram
from tests.support.harness import counters
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import ServedDevice, open_device
from tmemd.store import poolfile

PAGE: Final = pages.PAGE
MIB: Final = 1 << 20
RUN: Final = 32  # pages written by one request where the contents do not matter
SHARES: Final = 70, 90  # percent of the pages that are trimmed
POOLS: Final = 256 * MIB, 8 << 30
SMALL_ROUNDS: Final = 16  # pools of the smaller size
MOVES: Final = 20_000  # in one call, as maintenance has it
BELOW: Final = 0.95  # of the limit, no put may be refused


@dataclass(frozen=True)
class Trimmed:
    """Pools that were filled, trimmed and filled again. Sizes in bytes."""

    corpus: str
    percent: int  # of the pages were trimmed
    refused: int  # puts, while less than 95 % of the limit was used
    again: float  # live slots as a part of the limit when the pool was full again
    compacted: int
    zram: int | None  # None: there is none here

    def __str__(self) -> str:
        """A row of the table."""
        ratio = f"{self.compacted / self.zram:.3f}" if self.zram else "no zram"
        return (
            f"{self.corpus:<15} {self.percent:>5} % {self.refused:>13} {self.again:>13.1%}"
            f" {self.compacted / MIB:>8.1f} MiB {ratio:>9}"
        )


@dataclass(frozen=True)
class Moved:
    """What compaction took in a pool of *pool* bytes of which half was trimmed."""

    pool: int
    moves: int
    seconds: float  # of CPU, as everywhere here
    longest: float  # for one call of MOVES moves

    @property
    def microseconds(self) -> float:
        """For one move, its share of the punching included."""
        return self.seconds / self.moves * 1e6

    def __str__(self) -> str:
        """A row of the table."""
        return f"{self.pool // MIB:>5} MiB {self.moves:>9} {self.microseconds:>16.2f} {self.longest * 1e3:>11.0f} ms"


@contextmanager
def ram_only(size: int, limit: int) -> Iterator[ServedDevice]:
    """A device without a backing file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as pools:
        served = open_device(DeviceConfig("fragmentation", size, None, limit, Path(pools)))
        try:
            yield served
        finally:
            served.close()


def fill(served: ServedDevice, corpus: mmap.mmap, wanted: Iterable[int], shift: int = 0) -> tuple[list[int], int]:
    """Write pages, each with the one of the corpus that is *shift* further, until one is refused with the limit near.

    Returns those that were stored, and how many were refused below that.
    """
    stored, refused, n = [], 0, len(corpus) // PAGE
    for page in wanted:
        at = (page + shift) % n * PAGE
        try:
            _core.pwrite(served.core, corpus[at : at + PAGE], page * PAGE, 0)
            stored.append(page)
        except OSError:
            now = counters(served.pool_path)
            if now.used_bytes > BELOW * now.limit_bytes:
                break
            refused += 1
    return stored, refused


def trim(served: ServedDevice, pages: Iterable[int]) -> None:
    """Trim single pages."""
    for page in pages:
        _core.trim(served.core, PAGE, page * PAGE, 0)


def chosen(stored: list[int], percent: int) -> list[int]:
    """A share of the pages, chosen at random but always the same ones."""
    return random.Random(percent).sample(stored, len(stored) * percent // 100)


def measure_roomy(corpus: mmap.mmap, percent: int) -> tuple[int, int]:
    """With room for all pages: what is taken once compacted, and how many puts are refused after."""
    n = len(corpus) // PAGE
    with ram_only(n * PAGE, 2 * n * PAGE) as served:
        stored, _ = fill(served, corpus, range(n))
        trim(served, gone := chosen(stored, percent))
        served.core.compact(1 << 40)
        compacted = counters(served.pool_path).used_bytes
        return compacted, fill(served, corpus, gone)[1]


def measure_tight(corpus: mmap.mmap, percent: int, limit: int) -> tuple[int, float]:
    """Filled to the limit, trimmed and filled again: puts refused, and live slots as a part of the limit then."""
    n = 2 * len(corpus) // PAGE
    with ram_only(n * PAGE, limit) as served:
        stored, refused = fill(served, corpus, range(n))
        trim(served, gone := chosen(stored, percent))
        more = fill(served, corpus, [*gone, *range(len(stored), n)], n // 4)[1]
        return refused + more, (counters(served.pool_path).used_bytes - served.core.free_slot_bytes()) / limit


def measure_trimmed(name: str, corpus: mmap.mmap, percent: int) -> Trimmed:
    """One corpus, one share."""
    compacted, refused = measure_roomy(corpus, percent)
    more, again = measure_tight(corpus, percent, len(corpus) // (4 if name == "captured" else 2))
    zrams = zram_taken(corpus, percent) if os.access(zram.CONTROL / "hot_add", os.R_OK) else None
    return Trimmed(name, percent, refused + more, again, compacted, zrams)


def zram_taken(corpus: mmap.mmap, percent: int) -> int:
    """What zram takes for the pages that are left."""
    stored = list(range(len(corpus) // PAGE))
    with zram.device(len(stored) * PAGE) as device:
        device.write_all(corpus, [(page, page) for page in stored])
        for page in chosen(stored, percent):
            device.discard(page)
        device.compact()
        return device.usage().used


def compact(pool: int) -> Moved:
    """Fill a pool of this size with pages as they are, trim half of them at random, and compact."""
    n = pool // PAGE
    with ram_only(n * PAGE, 2 * pool) as served:
        with served.pool_path.open("r+b") as file:
            poolfile.write_compression(file.fileno(), False)
        content = os.urandom(RUN * PAGE)
        for first in range(0, n, RUN):
            _core.pwrite(served.core, content, first * PAGE, 0)
        trim(served, chosen(list(range(n)), 50))
        moves, longest, start = 0, 0.0, time.process_time()
        while True:
            begun = time.process_time()
            served.core.compact(MOVES)
            longest = max(longest, time.process_time() - begun)
            before, moves = moves, counters(served.pool_path).moves
            if moves == before:
                return Moved(pool, moves, time.process_time() - start, longest)


def measure_moves(pool: int) -> Moved:
    """In pools of this size, as many as it takes for a second or so."""
    rounds = [compact(pool) for _ in range(max(SMALL_ROUNDS * POOLS[0] // pool, 1))]
    return Moved(
        pool, sum(it.moves for it in rounds), sum(it.seconds for it in rounds), max(it.longest for it in rounds)
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/fragmentation.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.add_argument("--pages", type=int, default=65536, help="pages of each corpus (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    parser.add_argument("--only", choices=("trims", "moves"), help="measure only this")
    return parser.parse_args()


def corpora(args: argparse.Namespace, directory: Path) -> Iterator[tuple[str, Path]]:
    """Files of pages, by name."""
    noise, captured = directory / "noise", args.corpus or directory / "captured"
    noise.write_bytes(os.urandom(args.pages * PAGE))
    yield "incompressible", noise
    if not args.corpus:
        pages.capture(captured, args.pages)
    yield "captured", captured


def measure_trims(args: argparse.Namespace) -> list[Trimmed]:
    """All corpora, all shares."""
    results = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for name, path in corpora(args, Path(directory)):
            with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as corpus:
                results += [measure_trimmed(name, corpus, percent) for percent in SHARES]
    return results


def main() -> int:
    """Measure and print."""
    args = parse_args()
    trims = measure_trims(args) if args.only != "moves" else []
    moves = [measure_moves(pool) for pool in POOLS] if args.only != "trims" else []
    if args.json:
        moved = [asdict(it) | {"microseconds": it.microseconds} for it in moves]
        print(json.dumps({"trims": [asdict(it) for it in trims], "moves": moved}, indent=1))
        return 0
    if trims:
        print("corpus          trimmed       refused  filled again      compacted   of zram", *trims, sep="\n")
    if moves:
        print("pool          moves  us of CPU a move    longest call", *moves, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
