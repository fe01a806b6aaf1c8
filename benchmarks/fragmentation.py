"""What random trims leave of a pool: puts refused, memory taken (against zram's), and what compaction costs.

A device without a backing file is filled to its limit, a share of its pages is trimmed at random, and it is filled again
with other pages. Its upkeep does not run: 'settled' is after one call of the core's settle. zram gets the same pages and
the same trims, and is told to compact. At the end, the time of a move of compaction in a small and in a large pool.
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
from tmemd.core import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.served import ServedDevice, open_device
from tmemd.store import poolfile

PAGE: Final = pages.PAGE
MIB: Final = 1 << 20
RUN: Final = 32  # pages written by one request where the contents do not matter
SHARES: Final = 70, 90  # percent of the pages that are trimmed
POOLS: Final = 256 * MIB, 8 << 30
MOVES: Final = 20_000  # in one settle, as upkeep has it
BELOW: Final = 0.95  # of the limit: no put may be refused


@dataclass(frozen=True)
class Trimmed:
    """A pool that was filled, trimmed and filled again. Sizes in bytes; of zram's: None where there is no zram."""

    corpus: str
    percent: int
    refused_below: int  # puts refused while less than 95 % of the limit was used
    filled_again: float  # live slots as a part of the limit at the first refusal of the second fill
    unsettled: int
    settled: int
    zram: int | None


@dataclass(frozen=True)
class Moved:
    """What compaction took in a pool of *pool* bytes of which half was trimmed."""

    pool: int
    moves: int
    seconds: float
    longest: float  # seconds for one settle of MOVES moves

    @property
    def microseconds(self) -> float:
        """For one move, its share of the punching included."""
        return self.seconds / self.moves * 1e6


@contextmanager
def ram_only(size: int, limit: int) -> Iterator[ServedDevice]:
    """A device without a backing file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as pools:
        served = open_device(DeviceConfig("fragmentation", size, None, limit, Path(pools)))
        try:
            yield served
        finally:
            served.close()


def fill(served: ServedDevice, corpus: mmap.mmap, wanted: Iterable[int], shift: int) -> tuple[list[int], int, float]:
    """Write pages until one is refused at 95 % of the limit or above.

    Returns the pages that were stored, how many were refused below that, and what live slots took then, of the limit.
    """
    stored, below, n, limit = [], 0, len(corpus) // PAGE, served.counters().limit_bytes
    for page in wanted:
        at = (page + shift) % n * PAGE
        try:
            _core.pwrite(served.core, corpus[at : at + PAGE], page * PAGE, 0)
            stored.append(page)
        except OSError:
            used = served.counters().used_bytes
            if used >= BELOW * limit:
                return stored, below, (used - served.core.wasted()) / limit
            below += 1
    return stored, below, (served.counters().used_bytes - served.core.wasted()) / limit


def trim(served: ServedDevice, chosen: Iterable[int]) -> None:
    """Trim single pages."""
    for page in chosen:
        _core.trim(served.core, PAGE, page * PAGE, 0)


def measure_trimmed(name: str, corpus: mmap.mmap, percent: int) -> Trimmed:
    """One corpus, one share."""
    n = len(corpus) // PAGE
    rng = random.Random(percent)
    with ram_only(2 * n * PAGE, n * PAGE // (1 if name == "incompressible" else 4)) as served:
        stored, below, _ = fill(served, corpus, range(2 * n), 0)
        chosen = rng.sample(stored, len(stored) * percent // 100)
        trim(served, chosen)
        unsettled = served.counters().used_bytes
        again, more, filled = fill(served, corpus, [*chosen, *range(len(stored), 2 * n)], n // 2)
        below += more
        everything = sorted({*stored, *again})
        trim(served, everything)
        fill(served, corpus, stored, 0)
        trim(served, chosen)
        served.core.settle(1 << 40)
        settled = served.counters().used_bytes
    theirs = zram_taken(corpus, stored, chosen) if os.access(zram.CONTROL / "hot_add", os.R_OK) else None
    return Trimmed(name, percent, below, filled, unsettled, settled, theirs)


def zram_taken(corpus: mmap.mmap, stored: list[int], chosen: list[int]) -> int:
    """What zram takes for the same."""
    n = len(corpus) // PAGE
    with zram.device(2 * n * PAGE) as device:
        device.write_all(corpus, [(page, page % n) for page in stored])
        for page in chosen:
            device.discard(page)
        device.compact()
        return device.usage().used


def measure_moves(pool: int) -> Moved:
    """Fill a pool of this size with pages as they are, trim half of them at random, and compact."""
    n = pool // PAGE
    with ram_only(n * PAGE, 2 * pool) as served:
        with served.pool_path.open("r+b") as file:
            poolfile.write_compression(file.fileno(), False)
        content = random.Random(1).randbytes(RUN * PAGE)
        for first in range(0, n, RUN):
            _core.pwrite(served.core, content, first * PAGE, 0)
        trim(served, random.Random(2).sample(range(n), n // 2))
        moves, longest, start = served.counters().moves, 0.0, time.monotonic()
        while True:
            begun, before = time.monotonic(), served.counters().moves
            served.core.settle(MOVES)
            longest = max(longest, time.monotonic() - begun)
            if served.counters().moves == before:
                break
        return Moved(pool, served.counters().moves - moves, time.monotonic() - start, longest)


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
    noise.write_bytes(random.Random(1).randbytes(args.pages * PAGE))
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
        print("corpus          trimmed  refused below 95 %  refilled to    unsettled      settled     of zram")
    for it in trims:
        ratio = f"{it.settled / it.zram:.3f}" if it.zram else "no zram"
        print(
            f"{it.corpus:<15} {it.percent:>5} %  {it.refused_below:>18}  {it.filled_again:>9.1%}"
            f" {it.unsettled / MIB:>8.1f} MiB {it.settled / MIB:>8.1f} MiB {ratio:>11}"
        )
    if moves:
        print("pool          moves  microseconds a move  longest settle")
    for it2 in moves:
        print(f"{it2.pool // MIB:>5} MiB {it2.moves:>9} {it2.microseconds:>20.2f} {it2.longest * 1e3:>12.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
