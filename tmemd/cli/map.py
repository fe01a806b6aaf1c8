# SPDX-License-Identifier: BSD-3-Clause
"""Show where the pages of a device are: nowhere, in tmem, in the file or source, or lost."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.text import Text

from tmemd.cli import common
from tmemd.sizes import format_size
from tmemd.store import poolindex
from tmemd.store.poolfile import PAGE, Identity
from tmemd.store.poolindex import Kind, Run

_LINES: Final = 16
_COLUMNS: Final = 64
_PLACES: Final = ("nowhere", "tmem", "file", "lost")
_PLACE_OF: Final = {Kind.NOWHERE: 0, Kind.ZERO: 0, Kind.TMEM: 1, Kind.FILE: 2, Kind.LOST: 3, Kind.TORN: 3}
_SIGNS: Final = (".", "#", "-", "!")
_STYLES: Final = ("dim", "green", "yellow", "bold red")


add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Print the picture, or with --json the ranges."""
    with common.pool_index(arguments) as (fd, _, identity):
        (_print_ranges if arguments.json else _print_picture)(identity, poolindex.runs(fd, identity))
    return 0


def _print_ranges(identity: Identity, runs: Iterable[Run]) -> None:
    counts = [0] * len(_PLACES)
    ranges = []
    for start, count, place in _merge(runs):
        counts[place] += count
        ranges.append({"start": start, "count": count, "where": _PLACES[place]})
    totals = dict(zip(_PLACES, counts, strict=True))
    common.print_json({"name": identity.name, "pages": identity.pages, "counts": totals, "ranges": ranges})


def _merge(runs: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """Start, count and place: to a guest, pages of zeros are nowhere whether or not the file knows it."""
    start, count, place = 0, 0, 0
    for run_ in runs:
        if count and _PLACE_OF[run_.kind] == place:
            count += run_.count
            continue
        if count:
            yield start, count, place
        start, count, place = run_.start, run_.count, _PLACE_OF[run_.kind]
    if count:
        yield start, count, place


def _print_picture(identity: Identity, runs: Iterable[Run]) -> None:
    cell_pages = max(1, -(-identity.pages // (_LINES * _COLUMNS)))
    cells = count_cells(runs, identity.pages, cell_pages)
    console = Console(highlight=False)
    scale = f"{identity.pages} pages, {cell_pages} ({format_size(cell_pages * PAGE)}) each sign"
    console.print(f"{identity.name}: {format_size(identity.size)}, {scale}", soft_wrap=True)
    for line in range(0, len(cells), _COLUMNS):
        text = Text()
        for place, same in groupby(map(main_place, cells[line : line + _COLUMNS])):
            text.append(_SIGNS[place] * len(list(same)), _STYLES[place])
        console.print(text, soft_wrap=True)
    legend = Text()
    names = ("nowhere", "tmem", "source", "lost") if identity.is_ephemeral else _PLACES
    for place, name in enumerate(names):
        legend.append(_SIGNS[place], _STYLES[place])
        legend.append(f" {name} {sum(cell[place] for cell in cells)}   ")
    console.print(legend, soft_wrap=True)


def count_cells(runs: Iterable[Run], pages: int, cell_pages: int) -> list[list[int]]:
    """For each stretch of *cell_pages* pages, how many are in each of the places."""
    cells = [[0] * len(_PLACES) for _ in range(-(-pages // cell_pages))]
    for run_ in runs:
        place, page, end = _PLACE_OF[run_.kind], run_.start, run_.start + run_.count
        while page < end:
            stop = min(end, (page // cell_pages + 1) * cell_pages)
            cells[page // cell_pages][place] += stop - page
            page = stop
    return cells


def main_place(cell: list[int]) -> int:
    """The place to draw: one lost page is worth seeing, and empty pages only where there is nothing else."""
    if cell[3]:
        return 3
    if not cell[1] and not cell[2]:
        return 0
    return 1 if cell[1] >= cell[2] else 2
