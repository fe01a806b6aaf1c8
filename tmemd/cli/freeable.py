# SPDX-License-Identifier: BSD-3-Clause
"""Say what demotion could give back: of each pool, or of those named.

IDLE is what nobody used for over a minute, INCOMPRESSIBLE what takes as much in RAM as in the file.
"""

from __future__ import annotations

import argparse

import msgspec

from tmemd.cli import common
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size


class Freeable(msgspec.Struct, frozen=True):
    """Of one pool, in bytes; None: no age statistics were published yet."""

    name: str
    freeable_bytes: int
    idle_bytes: int | None
    incompressible_bytes: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="a pool's name (default: all)")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print it, and the sum."""
    pools = [_freeable(status) for status in common.chosen(common.client(arguments).pools(long=True), arguments.names)]
    total = sum(pool.freeable_bytes for pool in pools)
    if arguments.json:
        common.print_json({"freeable_bytes": total, "pools": pools})
        return 0
    table = common.table("NAME", "FREEABLE", "IDLE", "INCOMPRESSIBLE")
    for pool in pools:
        table.add_row(pool.name, *map(_size, (pool.freeable_bytes, pool.idle_bytes, pool.incompressible_bytes)))
    common.print_table(table)
    print(f"{format_size(total)} in all")
    return 0


def _freeable(status: PoolStatus) -> Freeable:
    ages = status.ages
    if ages is None or not ages.published or not status.has_file:
        return Freeable(status.name, status.freeable_bytes, None, None)
    most = status.freeable_bytes
    return Freeable(status.name, most, min(ages.stored_bytes[-1], most), min(sum(ages.raw_bytes), most))


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_size(nbytes)
