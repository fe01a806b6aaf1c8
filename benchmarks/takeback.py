"""How fast does a host get memory back whose target falls to a quarter?

Once with all pages cold, neighbours side by side, once with every other page hot, so that each cold one is a write of
its own. The device's own maintenance does the work; what counts is what tmpfs gives back.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks import pages
from tests.support.harness import counters
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

    @property
    def seconds_per_gib(self) -> float:
        """Of memory given back."""
        return self.seconds / self.given_back_bytes * GIB


def fill(served: ServedDevice, corpus: bytes, n: int) -> None:
    """Write pages in order, each with some page of the corpus."""
    rng = random.Random(1)
    for page in range(FIRST, FIRST + n):
        at = rng.randrange(len(corpus) // PAGE) * PAGE
        _core.pwrite(served.core, corpus[at : at + PAGE], page * PAGE, 0)


def take_back(served: ServedDevice, case: str) -> Result:
    """Let the target fall, and wait until use has followed."""
    before, start = counters(served.pool_path), time.monotonic()
    target = before.used_bytes // 4
    with served.pool_path.open("r+b") as pool:
        poolfile.write_target(pool.fileno(), target)
    while served.pool_path.stat().st_blocks * 512 > target:
        time.sleep(0.002)
    seconds, after = time.monotonic() - start, counters(served.pool_path)
    written = (after.demotion_writes - before.demotion_writes) * PAGE
    return Result(case, before.used_bytes - after.used_bytes, seconds, written)


def measure(case: str, stride: int, corpus: bytes, n: int) -> Result:
    """One device, with all but each *stride*-th page cold."""
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=TMPFS) as pools:
        size = (FIRST + n + 1024) * PAGE
        served = open_device(DeviceConfig("takeback", size, Path(disk) / "backing", 2 * size, Path(pools)))
        try:
            fill(served, corpus, n)
            served.core.begin_generation()
            for page in range(FIRST, FIRST + n, stride) if stride else ():
                _core.pread(served.core, bytearray(PAGE), page * PAGE, 0)
            served.core.compact(1 << 30)
            served.start()
            return take_back(served, case)
        finally:
            served.close()


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
    results = [measure(case, stride, content, args.pages) for case, stride in (("neighbours", 0), ("scattered", 2))]
    if args.json:
        print(json.dumps([asdict(it) | {"seconds_per_gib": it.seconds_per_gib} for it in results], indent=1))
        return 0
    print("cold pages   given back  seconds per GiB  of the disk's writes")
    for it in results:
        rate = it.written_bytes / it.seconds / 2**20
        print(f"{it.case:<12} {it.given_back_bytes / 2**20:>6.0f} MiB {it.seconds_per_gib:>13.1f} {rate:>16.0f} MiB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
