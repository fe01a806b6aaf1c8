# SPDX-License-Identifier: BSD-3-Clause
"""List the pools.

TARGET is the RAM that a pool may take, USED what it takes. TMEM, FILE and LOST are pages of 4 KiB by where they are,
PUTS and REFUSED those that were offered to tmem, and not taken, since the pool was made. FILE is the backing file, or
the source of an ephemeral pool, whose pages in tmem are copies.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from tmemd.cli import common
from tmemd.cli.activity import AGES_SECONDS, Latency, long_form, summary
from tmemd.cli.screen import format_seconds
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("-l", "--long", action="store_true", help="with settings, hit share, latencies and ages")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print all pools that may be seen."""
    listed = common.client(arguments).listed(long=arguments.long)
    pools = listed.pools
    if arguments.json:
        common.print_json([long_form(status) if arguments.long else status.flat() for status in pools])
    else:
        _print(("SIZE", "TARGET", "USED", "TMEM", "FILE", "LOST", "PUTS", "REFUSED", "KIND", "STATE"), map(_row, pools))
        if arguments.long:
            _print_long(pools)
    common.warn_of_problems(listed.problems)
    for status in pools:
        common.warn_of(status)
    return 0


def _print_long(pools: Sequence[PoolStatus]) -> None:
    print()
    _print(("WEIGHT", "MINIMUM", "CAP", "FIXED", "COMPRESS", "FREEABLE", "RATIO", "HITS"), map(_settings, pools))
    print("\nlatencies, median and 99th percentile")
    _print(("PUT", "GET", "SPILL", "FILE READ"), map(_latencies, pools))
    print("\nRAM of pages last used")
    _print((*(f"<{seconds:g}s" for seconds in AGES_SECONDS), "OLDER"), map(_ages, pools))


def _print(columns: Sequence[str], rows: Iterable[list[str]]) -> None:
    table = common.table("NAME", *columns, left=["KIND", "STATE"])
    for row in rows:
        table.add_row(*row)
    common.print_table(table)


def _row(status: PoolStatus) -> list[str]:
    counters = status.counters
    sizes = (status.size, status.target_bytes, counters.used_bytes)
    counts = (counters.pages_in_tmem, counters.pages_in_file, counters.pages_lost, counters.puts, counters.puts_refused)
    return [status.name, *map(format_size, sizes), *map(str, counts), status.kind or "-", common.state(status)]


def _settings(status: PoolStatus) -> list[str]:
    settings, known = status.settings, summary(status)
    sizes = (settings.minimum, settings.cap, settings.target)
    return [
        status.name,
        str(settings.weight),
        *("-" if size is None else format_size(size) for size in sizes),
        "on" if settings.compression else "off",
        format_size(status.freeable_bytes),
        "-" if known.compression_ratio is None else f"{known.compression_ratio:.2f}",
        "-" if known.hit_share is None else f"{known.hit_share:.1%}",
    ]


def _latencies(status: PoolStatus) -> list[str]:
    known = summary(status)
    latencies = (known.put_seconds, known.get_seconds, known.spill_seconds, known.file_read_seconds)
    return [status.name, *map(_latency, latencies)]


def _latency(latency: Latency) -> str:
    return "-" if latency.median is None else f"{format_seconds(latency.median)} {format_seconds(latency.p99):>5}"


def _ages(status: PoolStatus) -> list[str]:
    found = summary(status).stored_by_age
    return [status.name, *(format_size(age.stored_bytes) for age in found or ())]
