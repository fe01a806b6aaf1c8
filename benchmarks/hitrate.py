# SPDX-License-Identifier: BSD-3-Clause
"""Replay block traces through a cache device, and through models of caches of the same size.

Prints what share of the pages that were read each had. The core column is a device with its pool and its maintenance,
without nbdkit; the models hold as many pages as its pool held at most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.support import cache_replay
from tests.support.cache_replay import Trace
from tests.support.caches import CACHES
from tmemd.cli import common

TRACES: Final = Path(__file__).resolve().parent / "traces"
SIZES: Final = (5, 10, 25, 50)  # percent of the trace's distinct pages


@dataclass(frozen=True)
class Result:
    """One trace at one size."""

    trace: str
    percent: int  # of the trace's distinct pages
    pages: int  # that each cache holds
    hits: dict[str, float]  # by cache, percent of the pages read


def measure(trace: Trace, percent: int) -> Result:
    """One trace, with RAM for a part of its distinct pages."""
    core = cache_replay.replay(trace.requests, trace.pages, trace.pages * percent // 100)
    found = {name: cache_replay.hits(make(core.held, trace.pages), trace.requests) for name, make in CACHES.items()}
    return Result(trace.name, percent, core.held, found | {"core": core.hits})


def measure_all(paths: Sequence[Path], sizes: Sequence[int]) -> Iterator[Result]:
    """Each trace at each size, in percent of its distinct pages."""
    for trace in map(cache_replay.load, paths):
        for percent in sizes:
            yield measure(trace, percent)


def show(results: Sequence[Result]) -> None:
    """A table for people."""
    table = common.table("TRACE", "SIZE", "PAGES", *results[0].hits, "CORE - LRU")
    for it in results:
        shares = [f"{share:.1f}" for share in it.hits.values()]
        table.add_row(it.trace, f"{it.percent} %", str(it.pages), *shares, f"{it.hits['core'] - it.hits['LRU']:+.1f}")
    common.print_table(table)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make hitrate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("traces", type=Path, nargs="*", default=sorted(TRACES.glob("*.csv.xz")), metavar="TRACE")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="PERCENT")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    return parser.parse_args()


def main() -> int:
    """Measure and print."""
    args = parse_args()
    results = list(measure_all(args.traces, args.sizes))
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
