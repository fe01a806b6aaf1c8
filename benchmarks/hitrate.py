"""Replay block traces through models of caches of the same size, and print what share of the pages read each had."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.caches import CACHES, Cache
from tests.support import blocktrace
from tests.support.blocktrace import Op
from tmemd.cli import common

TRACES: Final = Path(__file__).resolve().parent / "traces"
SIZES: Final = (5, 10, 25, 50)  # percent of the trace's distinct pages

Uses = Sequence[tuple[int, bool]]
"""Pages in the order in which they were used, and whether each was read (or written)."""


@dataclass(frozen=True)
class Result:
    """One trace at one size."""

    trace: str
    percent: int  # of the trace's distinct pages
    pages: int  # that the cache holds
    hits: dict[str, float]  # by cache, percent of the pages read


def load(path: Path) -> Uses:
    """A trace, page by page, numbered without gaps in the order of the device. Trims are left out."""
    used = [
        (page, access.op is Op.READ)
        for access in blocktrace.read(path)
        if access.op is not Op.TRIM
        for page in range(access.page, access.page + access.pages)
    ]
    number = {page: n for n, page in enumerate(sorted({page for page, _ in used}))}
    return [(number[page], is_read) for page, is_read in used]


def hits(cache: Cache, uses: Uses) -> float:
    """Percent of the pages read that the cache had."""
    had = sum([is_read for page, is_read in uses if cache.use(page)])
    return 100 * had / sum(is_read for _, is_read in uses)


def measure(path: Path, sizes: Sequence[int]) -> Iterator[Result]:
    """One trace at each size, in percent of its distinct pages."""
    uses = load(path)
    distinct = len({page for page, _ in uses})
    for percent in sizes:
        capacity = distinct * percent // 100
        found = {name: hits(make(capacity, distinct), uses) for name, make in CACHES.items()}
        yield Result(path.name.partition(".")[0], percent, capacity, found)


def show(results: Sequence[Result]) -> None:
    """A table for people."""
    table = common.table("TRACE", "SIZE", "PAGES", *CACHES, "OURS - LRU")
    for it in results:
        shares = [f"{share:.1f}" for share in it.hits.values()]
        table.add_row(it.trace, f"{it.percent} %", str(it.pages), *shares, f"{it.hits['ours'] - it.hits['LRU']:+.1f}")
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
    results = [result for path in args.traces for result in measure(path, args.sizes)]
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
