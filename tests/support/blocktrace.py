# SPDX-License-Identifier: BSD-3-Clause
"""Block traces: what real guests asked of a device at its NBD export, one request after the other.

A trace is a file of comma-separated values, packed by xz. Its first line names the columns:

    ms      milliseconds since the request before it
    client  the guest's number, from 0, in the order of their first requests
    op      R: read, W: write, T: trim, or write zeros
    page    the first page of 4096 bytes
    pages   how many; a request that begins or ends within a page counts all of it
"""

from __future__ import annotations

import csv
import lzma
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

PAGE: Final = 4096
_COLUMNS: Final = ("ms", "client", "op", "page", "pages")
_LOGGED: Final = re.compile(
    r"(?P<time>\S+ \S+) connection=(?P<connection>\d+) (?P<name>Read|Write|Trim|Zero) id=\d+ "
    r"offset=(?P<offset>\w+) count=(?P<count>\w+)"
)


class Op(StrEnum):
    """What a guest asked for."""

    READ = "R"
    WRITE = "W"
    TRIM = "T"


_OPS: Final = {"Read": Op.READ, "Write": Op.WRITE, "Trim": Op.TRIM, "Zero": Op.TRIM}


class Access(NamedTuple):
    """One request."""

    ms: int  # since the first request
    client: int
    op: Op
    page: int
    pages: int

    def covers(self) -> range:
        """The pages that it is about."""
        return range(self.page, self.page + self.pages)


def read(path: Path) -> Iterator[Access]:
    """The requests of a trace, in their order. OSError, lzma.LZMAError or ValueError when it is none."""
    with lzma.open(path, "rt", newline="") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != _COLUMNS:
            raise ValueError(f"{path} is no block trace")
        now = 0
        for ms, client, op, page, pages in rows:
            now += int(ms)
            yield Access(now, int(client), Op(op), int(page), int(pages))


def write(path: Path, trace: Iterable[Access]) -> None:
    """Make a file that `read` reads."""
    with lzma.open(path, "wt", preset=9 | lzma.PRESET_EXTREME, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        before = 0
        for access in trace:
            rows.writerow((access.ms - before, *access[1:]))
            before = access.ms


def logged(lines: Iterable[str]) -> Iterator[Access]:
    """The requests in what nbdkit's log filter wrote."""
    clients: dict[str, int] = {}
    start = None
    for found in filter(None, map(_LOGGED.match, lines)):
        now = datetime.fromisoformat(found["time"])
        start = start or now
        offset, count = int(found["offset"], 16), int(found["count"], 16)
        yield Access(
            ms=round((now - start).total_seconds() * 1000),
            client=clients.setdefault(found["connection"], len(clients)),
            op=_OPS[found["name"]],
            page=offset // PAGE,
            pages=-(-(offset + count) // PAGE) - offset // PAGE,
        )
