"""List the pools."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from tmemd.cli import common
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print all pools that may be seen."""
    pools = common.client(arguments).pools()
    if arguments.json:
        common.print_json([status.flat() for status in pools])
        return 0
    table = Table(box=None, pad_edge=False)
    table.add_column("NAME", no_wrap=True)
    for column in ("SIZE", "TARGET", "USED", "TMEM", "FILE", "LOST", "PUTS", "REFUSED"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    for status in pools:
        table.add_row(*_row(status))
    # A pipe has no width to fit.
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(width=200, highlight=False).print(table)
    for status in pools:
        if status.error:
            common.warn(status.error)
    return 0


def _row(status: PoolStatus) -> list[str]:
    counters = status.counters
    sizes = (status.size, status.target_bytes, counters.used_bytes)
    counts = (counters.pages_in_tmem, counters.pages_in_file, counters.pages_lost, counters.puts, counters.puts_refused)
    return [status.name, *map(format_size, sizes), *map(str, counts), common.state(status)]
