# SPDX-License-Identifier: BSD-3-Clause
"""List pools and devices: all, or those named.

TARGET is the RAM that a pool may take, USED what it takes. TMEM and FILE are pages of 4 KiB by where they are; DOOR is
how clients came in, CLIENTS how many connections they have. BACKING is the backing file, or the source of an ephemeral
pool, whose pages in tmem are copies. Columns are called as in JSON; what is not in the table --columns shows. 'tmemctl
show' explains what stands in STATE; a device that is defined here and not served is starting, stopped, failed, or
unfinished, which was made or removed only in part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tmemd import protocol
from tmemd.cli import columns, common
from tmemd.cli.activity import AGES_SECONDS, Latency, long_form, short_form, summary
from tmemd.cli.defined import with_devices
from tmemd.cli.screen import format_seconds
from tmemd.client import Client, UnreachableError
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a pool's name (default: all)")
    add("-l", "--long", action="store_true", help="with settings, hit share, latencies and ages")
    add("--columns", type=_checked(columns.parse), metavar="NAME,NAME,...", help="these columns, or 'all'")
    add("--sort", type=_checked(columns.find), default="name", metavar="COLUMN",
        help="words from a to z, numbers from the largest (%(default)s)")  # fmt: skip
    add("-r", "--reverse", action="store_true", help="the other way round")
    add("--bytes", action="store_true", help="sizes to the byte")
    add("--watch", action="store_true", help="again and again; Ctrl-C ends it")
    add("--interval", type=common.seconds(0.1, 3600), default=2.0, metavar="SECONDS",
        help="between two looks of --watch (%(default)g)")  # fmt: skip
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    client = common.client(arguments)
    listed = _look(client, arguments)
    if arguments.watch:
        _watch(client, arguments, listed)
    _print(arguments, listed.pools)
    common.warn_of_problems(listed.problems)
    for status in listed.pools:
        if status.error:
            common.warn(common.printable(status.error))
    return 0


def _checked(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    def checked(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _look(client: Client, arguments: argparse.Namespace) -> protocol.Listed:
    """What was asked for, in its order. Raises PoolError."""
    needs_more = arguments.long or not set(arguments.columns or ()) <= set(columns.DEFAULT)
    listed = client.listed(long=needs_more or arguments.sort not in columns.DEFAULT)
    found = listed.pools if arguments.pools else with_devices(listed.pools)
    pools = {status.name: status for status in common.chosen(found, arguments.names)}
    order = columns.sort([columns.row(status) for status in pools.values()], arguments.sort, reverse=arguments.reverse)
    return protocol.Listed([pools[each["name"]] for each in order], listed.problems)


def _print(arguments: argparse.Namespace, pools: Sequence[PoolStatus]) -> None:
    if arguments.json:
        common.print_json([_object(status, arguments) for status in pools])
        return
    common.print_table(_table(arguments, pools))
    if arguments.long:
        _print_long(pools)


def _object(status: PoolStatus, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.columns:
        row = columns.row(status)
        return {column: row[column] for column in arguments.columns}
    return long_form(status) if arguments.long else short_form(status)


def _table(arguments: argparse.Namespace, pools: Sequence[PoolStatus]) -> Table:
    shown = arguments.columns or columns.DEFAULT
    left = [columns.title(column) for column in shown if columns.is_text(column)]
    table = common.table(*map(columns.title, shown), left=left)
    for status in pools:
        row = columns.row(status)
        table.add_row(*(columns.cell(column, row[column], plain_bytes=arguments.bytes) for column in shown))
    return table


# Again and again.


def _watch(client: Client, arguments: argparse.Namespace, listed: protocol.Listed) -> None:
    """Until Ctrl-C: a table in its place on a terminal, else one below the other, or JSON line by line."""
    console = Console(highlight=False)
    if arguments.json or not console.is_terminal:
        while True:
            _print_again(arguments, listed.pools)
            listed = _look_again(client, arguments, listed)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_table(arguments, listed.pools), refresh=True)
            listed = _look_again(client, arguments, listed)


def _print_again(arguments: argparse.Namespace, pools: Sequence[PoolStatus]) -> None:
    if arguments.json:
        common.print_json_line({"time": time.time(), "pools": [_object(status, arguments) for status in pools]})
    else:
        print(time.strftime("%H:%M:%S", time.localtime()))
        common.print_table(_table(arguments, pools))
        print(flush=True)


def _look_again(client: Client, arguments: argparse.Namespace, before: protocol.Listed) -> protocol.Listed:
    """After the interval; what was known before while tmemd is away."""
    time.sleep(arguments.interval)
    try:
        return _look(client, arguments)
    except UnreachableError as error:
        common.warn(f"{error}; trying again")
        return before


# What --long adds.


def _print_long(pools: Sequence[PoolStatus]) -> None:
    print()
    _print_part(("WEIGHT", "MINIMUM", "CAP", "FIXED", "COMPRESS", "FREEABLE", "RATIO", "HITS"), map(_settings, pools))
    print("\nlatencies, median and 99th percentile")
    _print_part(("PUT", "GET", "SPILL", "FILE READ"), map(_latencies, pools))
    print("\nRAM of pages last used")
    _print_part((*(f"<{seconds:g}s" for seconds in AGES_SECONDS), "OLDER"), map(_ages, pools))


def _print_part(titles: Sequence[str], rows: Iterable[list[str]]) -> None:
    table = common.table("NAME", *titles)
    for row in rows:
        table.add_row(*row)
    common.print_table(table)


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
