# SPDX-License-Identifier: BSD-3-Clause
"""The columns of `tmemctl list`: everything that `show --json` says in one value, by the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tmemd.cli import common
from tmemd.cli.activity import long_form
from tmemd.cli.screen import format_seconds
from tmemd.protocol import OLD_NAMES, PoolStatus
from tmemd.sizes import format_size
from tmemd.store.poolfile import Counters
from tmemd.suggestions import suggestion

DEFAULT: Final = (
    "name", "state", "kind", "size_bytes", "target_bytes", "used_bytes", "pages_in_tmem", "pages_in_file", "door",
    "clients", "backing",
)  # fmt: skip
_TITLES: Final = {"pages_in_tmem": "TMEM", "pages_in_file": "FILE", "pages_lost": "LOST", "puts_refused": "REFUSED"}
_NOT_ONE_VALUE: Final = {"latencies", "ages", "doors", "remote", "connections", "stored_by_age", "warnings", *OLD_NAMES}

Row = Mapping[str, Any]  # the values of one pool, by column


def row(status: PoolStatus) -> dict[str, Any]:
    """All that can be a column, of one pool; only with latencies and ages where these were asked for."""
    found = long_form(status)
    doors: dict[str, int] = found["connections"]
    words = dict.fromkeys([status.state, *found["warnings"]])
    own = {
        "state": ", ".join(words),
        "door": ", ".join(door for door, count in doors.items() if count) or None,
        "clients": sum(doors.values()),
        "backing": found["backing"] or found["source"] or None,
    }
    return {key: value for key, value in (found | own).items() if key not in _NOT_ONE_VALUE}


def _names() -> tuple[str, ...]:
    nothing = Counters(*(0 for _ in Counters.__struct_fields__))
    return tuple(row(PoolStatus(
        name="", path="", uid=0, size=0, has_file=False, backing="", target_bytes=0, frozen=False, served=False,
        error=None, counters=nothing,
    )))  # fmt: skip


NAMES: Final = _names()


def parse(text: str) -> tuple[str, ...]:
    """Columns from 'name,used,state'; 'all' are all. '_bytes' may be left out. Raises ValueError."""
    if text == "all":
        return NAMES
    return tuple(dict.fromkeys(find(word.strip()) for word in text.split(",")))


def find(word: str) -> str:
    """A column by its name or its title. Raises ValueError."""
    name = word.lower().replace("-", "_")
    if name in NAMES or f"{name}_bytes" in NAMES:
        return name if name in NAMES else f"{name}_bytes"
    if word.upper() in _BY_TITLE:
        return _BY_TITLE[word.upper()]
    raise ValueError(f"there is no column {word!r}{suggestion(name, NAMES)} ('all' shows them all)")


def title(column: str) -> str:
    """What stands above it."""
    return _TITLES.get(column) or column.removesuffix("_bytes").replace("_", " ").upper()


_BY_TITLE: Final = {title(name): name for name in NAMES}
_LEFT: Final = {"name", "state", "kind", "door", "backing", "source", "path", "error"}


def is_text(column: str) -> bool:
    """Whether it is of words, which stand at the left, and are sorted from a to z; numbers are from the largest."""
    return column in _LEFT


def cell(column: str, value: Any, *, plain_bytes: bool) -> str:
    """A value for people; *plain_bytes*: sizes to the byte."""
    if value is None or value == "":
        return "-"
    if column.endswith("_bytes"):
        return str(value) if plain_bytes else format_size(value)
    if isinstance(value, dict):  # of latencies
        return "-" if value["median"] is None else f"{format_seconds(value['median'])} {format_seconds(value['p99'])}"
    if column == "miss_seconds":
        return format_seconds(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else common.printable(str(value))


def sort(rows: Sequence[Row], column: str, *, reverse: bool) -> list[Row]:
    """The rows by that column, and by name where it is the same; what has no value stands last."""
    by_name = sorted(rows, key=lambda each: each["name"])
    there = [each for each in by_name if each[column] is not None]
    there.sort(key=_key(column), reverse=reverse if is_text(column) else not reverse)
    return [*there, *(each for each in by_name if each[column] is None)]


def _key(column: str) -> Callable[[Row], Any]:
    def key(each: Row) -> Any:
        value = each[column]
        return (value["median"] or 0.0) if isinstance(value, dict) else value

    return key
