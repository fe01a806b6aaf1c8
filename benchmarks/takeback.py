# SPDX-License-Identifier: BSD-3-Clause
"""How fast does a host get memory back whose target falls to a quarter?

Once with all pages cold, neighbours side by side, once with every other page hot, so that each cold one is a write of
its own; then the same of a swap device with flush=durable and of a cache device, whose pages need not be written. The
device's own maintenance does the work; what counts is what tmpfs gives back. What a write of a page takes the core of
the two swap devices, one after the other, is said besides.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias

from benchmarks import pages
from tests.support.harness import counters, wait_until
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import ServedDevice, open_device
from tmemd.store import poolfile

PAGE: Final = pages.PAGE
FIRST: Final = 2048
TMPFS: Final = "/dev/shm"
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Result:
    """What it took."""

    case: str
    given_back_bytes: int
    seconds: float
    written_bytes: int
    write_us: float | None  # a page that a guest writes, median

    @property
    def seconds_per_gib(self) -> float:
        """Of memory given back."""
        return self.seconds / self.given_back_bytes * GIB


def some_pages(corpus: bytes, n: int) -> Iterator[bytes]:
    """So many pages of the corpus."""
    rng = random.Random(1)
    for _ in range(n):
        at = rng.randrange(len(corpus) // PAGE) * PAGE
        yield corpus[at : at + PAGE]


def open_swap(config: DeviceConfig, corpus: bytes, n: int, durable: bool = False) -> Filled:
    """A swap device with pages, neighbours."""
    served, seconds = open_device(replace(config, backing=config.source, source=None, durable=durable)), []
    for page, content in enumerate(some_pages(corpus, n), FIRST):
        start = time.perf_counter()
        _core.pwrite(served.core, content, page * PAGE, 0)
        seconds.append(time.perf_counter() - start)
    return served, median(seconds) * 1e6


def open_cache(config: DeviceConfig, corpus: bytes, n: int) -> Filled:
    """A cache device with the same pages, read from its source."""
    assert isinstance(config.source, Path)
    with config.source.open("wb") as source:
        source.seek(FIRST * PAGE)
        source.writelines(some_pages(corpus, n))
        source.truncate(config.size)
    served = open_device(config)
    for page in range(FIRST, FIRST + n):
        _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
        if page % 512 == 0:  # as many as can wait to be put, and as many again
            wait_until(lambda page=page: counters(served.pool_path).puts >= page - FIRST, "pages to be put")  # type: ignore[misc]
    wait_until(lambda: counters(served.pool_path).puts == n, "pages to be put")
    return served, None


def take_back(served: ServedDevice, case: str, write_us: float | None) -> Result:
    """Let the target fall, and wait until use has followed."""
    before, start = counters(served.pool_path), time.monotonic()
    target = before.used_bytes // 4
    with served.pool_path.open("r+b") as pool:
        poolfile.write_target(pool.fileno(), target)
    while served.pool_path.stat().st_blocks * 512 > target:
        time.sleep(0.002)
    seconds, after = time.monotonic() - start, counters(served.pool_path)
    written = (after.demotion_writes - before.demotion_writes) * PAGE
    return Result(case, before.used_bytes - after.used_bytes, seconds, written, write_us)


def measure(case: str, opening: Opening, stride: int, corpus: bytes, n: int) -> Result:
    """One device, with all but each *stride*-th page cold."""
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=TMPFS) as pools:
        size = (FIRST + n + 1024) * PAGE
        config = DeviceConfig("takeback", size, None, 2 * size, Path(pools), source=Path(disk) / "file")
        served, write_us = opening(config, corpus, n)
        try:
            served.core.begin_generation()
            for page in range(FIRST, FIRST + n, stride) if stride else ():
                _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
            served.core.compact(1 << 30)
            served.start()
            return take_back(served, case, write_us)
        finally:
            served.close()


Filled: TypeAlias = tuple[ServedDevice, float | None]  # and microseconds that a write of a page took
Opening: TypeAlias = Callable[[DeviceConfig, bytes, int], Filled]
CASES: Final[tuple[tuple[str, Opening, int], ...]] = (
    ("neighbours", open_swap, 0), ("scattered", open_swap, 2),
    ("durable, neighbours", partial(open_swap, durable=True), 0),
    ("durable, scattered", partial(open_swap, durable=True), 2),
    ("cache, neighbours", open_cache, 0), ("cache, scattered", open_cache, 2),
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/takeback.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--pages", type=int, default=200_000, help="pages to store (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=TMPFS) as memory:
        corpus = args.corpus or Path(memory) / "corpus"
        if not args.corpus:
            pages.capture(corpus, 16384)
        content = corpus.read_bytes()
    results = [measure(*case, content, args.pages) for case in CASES]
    if args.json:
        print(json.dumps([asdict(it) | {"seconds_per_gib": it.seconds_per_gib} for it in results], indent=1))
        return 0
    print("cold pages           given back  seconds per GiB  of the disk's writes  a write")
    for it in results:
        rate, write = it.written_bytes / it.seconds / 2**20, f"{it.write_us:>6.1f} us" if it.write_us else ""
        given = f"{it.given_back_bytes / 2**20:>6.0f} MiB {it.seconds_per_gib:>13.2f}"
        print(f"{it.case:<20} {given} {rate:>16.0f} MiB/s {write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
