# SPDX-License-Identifier: BSD-3-Clause
"""What the commands share: where the pools are, and how answers are printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from tmemd.client import Client
from tmemd.protocol import DEFAULT_SOCKET, PoolStatus, Problem
from tmemd.sizes import format_size
from tmemd.store import poolindex
from tmemd.store.pool import open_pool_file
from tmemd.store.poolfile import Identity, PoolError, read_identity
from tmemd.suggestions import suggestion

AWAY: Final = 75  # exit status: try again later (EX_TEMPFAIL of sysexits.h), a device's NBD server is away
SCHEMA: Final = 2  # of JSON: one more when a name goes, or means something else; 0.1 said none
_WIDEST: Final = 1000  # of a table
_SOCKET_HELP: Final = f"where tmemd listens ($TMEMD_SOCKET, or {DEFAULT_SOCKET})"


def add_json(parser: argparse.ArgumentParser, *, default: Any = False) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", default=default, help="print JSON")


def add_where(parser: argparse.ArgumentParser) -> None:
    """--socket and --pools: a tmemd to ask, or a directory to work on without one."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path, metavar="PATH", help=_SOCKET_HELP)
    where.add_argument("--pools", type=Path, metavar="DIR", help="work without tmemd on the pools of this directory")


def add_socket(parser: argparse.ArgumentParser) -> None:
    """--socket, for what only a tmemd knows."""
    parser.add_argument("--socket", type=Path, metavar="PATH", help=_SOCKET_HELP)
    parser.set_defaults(pools=None)


def add_pool(parser: argparse.ArgumentParser) -> None:
    """The pool's name, and where it is."""
    parser.add_argument("name", metavar="NAME", help="the pool's name")
    add_where(parser)


def seconds(least: float, most: float) -> Callable[[str], float]:
    """What reads a number of seconds within these bounds from an argparse command line."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {least:g} to {most:g} seconds")

    return parse


def count(what: str) -> Callable[[str], int]:
    """What reads a number, of at least one such, from an argparse command line."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}")
        return int(text)

    return parse


def client(arguments: argparse.Namespace) -> Client:
    """Whom to ask, by the options of `add_where`."""
    if arguments.pools:
        return Client.of_directory(arguments.pools)
    return Client.of_daemon(arguments.socket or Path(os.environ.get("TMEMD_SOCKET") or DEFAULT_SOCKET), warn)


@contextmanager
def pool_index(arguments: argparse.Namespace) -> Iterator[tuple[int, Path, Identity]]:
    """The file of the pool that is named, opened to read its index; its path, and whose it is. Raises PoolError."""
    path = Path(client(arguments).pool(arguments.name).path)
    fd = open_pool_file(path, writable=False)
    try:
        identity = read_identity(fd, path)
        if identity is None:
            raise PoolError(f"pool {arguments.name} is unfinished")
        poolindex.check_layout(identity, path)
        yield fd, path, identity
    finally:
        os.close(fd)


def print_json(value: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """Print an object, or several, indented for people."""
    found = with_schema(value) if isinstance(value, dict) else [with_schema(each) for each in value]
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def print_json_line(value: dict[str, Any]) -> None:
    """Print an object on a line of its own, at once."""
    print(msgspec.json.encode(with_schema(value)).decode(), flush=True)


def with_schema(value: dict[str, Any]) -> dict[str, Any]:
    """The object, with the version of what its names mean in front."""
    return {"schema": SCHEMA, **value}


def table(*columns: str, left: Sequence[str] = ()) -> Table:
    """An empty table whose columns are numbers, but for the first and those named in *left*."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column in (columns[0], *left) else "right", no_wrap=True)
    return made


def chosen(pools: Sequence[PoolStatus], names: Sequence[str]) -> list[PoolStatus]:
    """Those of these names, each once, or all where there are none. Raises PoolError for a name that is none."""
    by_name = {status.name: status for status in pools}
    for name in names:
        if name not in by_name:
            raise PoolError(f"there is no pool {printable(name)}{suggestion(name, by_name)}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


def print_table(made: Table) -> None:
    """Print it as wide as it is: a terminal may break its lines, but a name that is cut off is of no use."""
    Console(width=_WIDEST, highlight=False).print(made)


def print_changed(arguments: argparse.Namespace) -> None:
    """After a change: with --json the pool as it is now, or all of them; without it nothing."""
    if arguments.json and arguments.name is None:
        print_json([status.flat() for status in client(arguments).pools()])
    elif arguments.json:
        print_json(client(arguments).pool(arguments.name).flat())


def printable(text: str) -> str:
    """The text itself, or quoted: what comes from files of other users may hold what a terminal would obey."""
    return text if text.isprintable() else ascii(text)


def warn_of(status: PoolStatus) -> None:
    """Lines on standard error about what somebody should do something about: all that is behind its warnings."""
    if status.error:
        warn(printable(status.error))
    if status.overtakes:
        warn(
            f"{status.name}: its file takes {format_size(status.taken_bytes)} of RAM, and its plugin knows of"
            f" {format_size(status.counters.used_bytes)}: user {status.uid}, whose it is, has filled it past its plugin"
        )
    if status.is_away and status.remote:
        warn(
            f"{status.name}: {printable(status.backing or status.source)} has been away for"
            f" {status.remote.away_ms // 1000} s: pages in RAM are served, what needs it waits, and fails in the end;"
            " its server's log and nbdinfo tell more"
        )
    if status.served and status.counters.is_fenced:
        warn(
            f"{status.name}: its lease on {printable(status.backing)} is over, so every request fails: another host"
            " has taken the device, or this one cannot reach it; its server's log tells which"
        )
    if status.counters.pages_lost:
        warn(
            f"{status.name}: {status.counters.pages_lost} pages were lost with the host, and read as I/O errors until"
            " they are written or trimmed, as swapon --discard does"
        )
    if status.never_trims:
        warn(
            f"{status.name}: its guest swaps and never says which pages are dead, so that they fill tmem:"
            " attach it as scripts/attach does (non-rotational, swapon --discard)"
        )


def warn_of_problems(problems: Sequence[Problem]) -> None:
    """Lines on standard error about what keeps tmemd from doing as it was told."""
    for problem in problems:
        warn(printable(problem.words))


def warn(message: str) -> None:
    """A line on standard error."""
    print(f"tmemctl: {message}", file=sys.stderr)
