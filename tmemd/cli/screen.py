# SPDX-License-Identifier: BSD-3-Clause
"""How `tmemctl top` looks: from a frame to what rich prints. Nothing here knows a terminal's size by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmemd.cli.activity import Activity, Latency
from tmemd.cli.common import printable
from tmemd.cli.watch import Frame
from tmemd.protocol import HostStatus
from tmemd.sizes import format_size
from tmemd.store.poolfile import PAGE

_GAP: Final = 2
_BAR: Final = (10, 28)  # cells, at least and at most
_NAME: Final = (8, 20)
_STATE: Final = len("frozen, idle")
_LINES: Final = ("━", "╸", "━")
_ASCII: Final = ("=", "-", ".")
_QUIET: Final = "bright_black"
_NOTABLE: Final = "yellow"
_GRAVE: Final = "red"
_GOOD_HIT_SHARE: Final = 0.9

# What --sort and the s key go through: what it is called, and by what.
SORTS: Final[dict[str, Callable[[Activity], float]]] = {
    "used": lambda pool: pool.used_bytes,
    "puts": lambda pool: pool.puts,
    "refusals": lambda pool: pool.refusals,
    "spills": lambda pool: pool.spills,
    "demotions": lambda pool: pool.demotions,
    "file-reads": lambda pool: pool.file_reads,
    "name": lambda _: 0,
}


@dataclass(frozen=True)
class View:
    """How to show a frame."""

    width: int
    height: int | None  # None: as many lines as it takes
    sort: str = "used"
    ascii_only: bool = False


@dataclass(frozen=True)
class _Scale:
    """What a bar is drawn with: its width in cells, and what its whole length stands for, in bytes."""

    width: int
    nbytes: int
    glyphs: tuple[str, str, str]  # of a whole cell, half a one, and one that is not used


@dataclass(frozen=True)
class _Column:
    title: str
    unit: str
    width: int
    importance: int  # what does not fit goes by this, the highest number first
    cell: Callable[[Activity], Text]
    left: bool = False


def format_count(value: float) -> str:
    """A number of things for people, in at most five characters: '0', '1.5', '850', '12.3k'."""
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    if value < 999.5:
        return f"{value:.0f}"
    unit = ""
    for larger in ("k", "M", "G"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.{1 if value < 99.95 else 0}f}{unit}"


def format_seconds(seconds: float | None) -> str:
    """A latency for people, in at most five characters: '850ns', '3.1us', '12ms', '1.5s'; '-' for none."""
    if seconds is None:
        return "-"
    value, unit = seconds * 1e9, "ns"
    for larger in ("us", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.{1 if value < 9.95 and unit != 'ns' else 0}f}{unit}"


def draw(frame: Frame, view: View, keys: str = "") -> RenderableType:
    """The whole picture, of *view*'s size. *keys* is the line at the bottom that says what can be pressed."""
    header = _header(frame, view.width)
    above = [*(header if view.height is None else header[: max(1, view.height // 4)]), Text()]
    below = [*_complaints(frame, view.width)]
    if keys:
        below += [Text(), Text(f"sorted by {view.sort}   {keys}", _QUIET, no_wrap=True, overflow="ellipsis")]
    pools = sorted(frame.pools, key=lambda pool: (-SORTS[view.sort](pool), pool.name))
    rows = len(pools) if view.height is None else max(1, view.height - len(above) - len(below) - 2)
    shown = pools if len(pools) <= rows else pools[: max(1, rows - 1)]
    body: list[RenderableType] = [_table(shown, pools, view, stale=frame.error is not None)]
    lines = 2 + len(shown)
    if len(shown) < len(pools):
        used = format_size(sum(pool.used_bytes for pool in pools[len(shown) :]))
        body.append(Text(f"and {len(pools) - len(shown)} more, with {used} of RAM", _QUIET, no_wrap=True))
        lines += 1
    elif not pools:
        body.append(Text("no pools", _QUIET))
        lines += 1
    blank = 0 if view.height is None else max(0, view.height - len(above) - lines - len(below))
    return Group(*above, *body, *[Text()] * blank, *below)


def _complaints(frame: Frame, width: int) -> list[Text]:
    lines = [Text(line, _NOTABLE) for line in frame.notes[:3]]
    if frame.error:
        lines.append(Text(f"{frame.error}; trying again", f"bold {_GRAVE}"))
    for line in lines:
        line.plain = printable(line.plain)
        line.truncate(width, overflow="ellipsis")
    return lines


# The header: facts that wrap as wholes.


def _header(frame: Frame, width: int) -> list[Text]:
    count = len(frame.pools)
    title = Text.assemble(("tmemd", "bold"), f"  {count} guest{'' if count == 1 else 's'}")
    facts = [title, *(_host(frame.host) if frame.host else _without_host(frame.pools))]
    return list(_packed(facts, width))


def _without_host(pools: Sequence[Activity]) -> Iterable[Text]:
    used, targets = sum(pool.used_bytes for pool in pools), sum(pool.target_bytes for pool in pools)
    yield _fact("used", format_size(used), f"of targets {format_size(targets)}")


def _host(host: HostStatus) -> Iterable[Text]:
    yield _fact("policy", host.policy)
    yield _fact("used", format_size(host.used_bytes), f"of targets {format_size(host.targets_bytes)}")
    yield _fact("budget", format_size(host.budget_bytes))
    yield _fact(
        "host", format_size(host.available_bytes), f"available of {format_size(host.total_bytes)}",
        f"reserve {format_size(host.reserve_bytes)}", notable=host.available_bytes < host.reserve_bytes,
    )  # fmt: skip
    if host.pressure_some is not None and host.pressure_full is not None:
        some, full = (f"{share:.1%}" for share in (host.pressure_some, host.pressure_full))
        yield _fact("pressure", some, f"full {full}", notable=host.pressure_full > 0)
    if host.writes_left_bytes is not None:
        yield _fact("demotion may write", format_size(host.writes_left_bytes))


def _fact(label: str, value: str, *more: str, notable: bool = False) -> Text:
    text = Text.assemble((label + " ", _QUIET), (printable(value), _NOTABLE if notable else "bold"))
    for words in more:
        text.append(" " + words, _QUIET)
    return text


def _packed(facts: Iterable[Text], width: int) -> Iterable[Text]:
    """As many facts on each line as fit."""
    line = Text()
    for fact in facts:
        if line and len(line) + 3 + len(fact) > width:
            yield line
            line = Text()
        line = line + Text("   ") + fact if line else fact
        line.truncate(width, overflow="ellipsis")
    yield line


# The table.


def _table(shown: Sequence[Activity], pools: Sequence[Activity], view: View, *, stale: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), style="dim" if stale else "")
    columns = _fitting(shown, pools, view)
    for column in columns:
        table.add_column(
            Text(f"{column.title}\n{column.unit}", f"not bold {_QUIET}"),
            width=column.width, justify="left" if column.left else "right", no_wrap=True, overflow="ellipsis",
        )  # fmt: skip
    for pool in shown:
        table.add_row(*(column.cell(pool) for column in columns))
    return table


def _fitting(shown: Sequence[Activity], pools: Sequence[Activity], view: View) -> list[_Column]:
    """The most important columns that the width has room for; what is left over makes the bars longer."""
    longest = max((len(pool.name) for pool in shown), default=0)
    nbytes = max((max(pool.target_bytes, pool.used_bytes) for pool in pools), default=1) or 1
    name = min(max(longest, _NAME[0]), _NAME[1])

    def columns(bar: int, state: int) -> list[_Column]:
        return _columns(name, _Scale(bar, nbytes, _ASCII if view.ascii_only else _LINES), state)

    room, kept = view.width, set[str]()  # rich before 13.7 pads the last column as well
    for column in sorted(columns(_BAR[0], _STATE), key=lambda column: column.importance):
        if kept and column.width + _GAP > room:
            break
        room -= column.width + _GAP
        kept.add(column.title)
    longer = min(_BAR[1] - _BAR[0], max(0, room))
    return [column for column in columns(_BAR[0] + longer, _STATE + max(0, room - longer)) if column.title in kept]


def _columns(name: int, scale: _Scale, state: int) -> list[_Column]:
    return [
        _Column("GUEST", "", name, 0, lambda pool: Text(_shortened(pool.name, name)), left=True),
        _Column("WEIGHT", "", 6, 10, lambda pool: Text(str(pool.weight))),
        _Column("RAM", "of target", scale.width, 3, lambda pool: _bar(pool, scale), left=True),
        _Column("USED", "", 5, 1, lambda pool: Text(format_size(pool.used_bytes))),
        _Column("TARGET", "", 6, 2, lambda pool: Text(format_size(pool.target_bytes))),
        _Column("IN TMEM", "", 7, 7, lambda pool: _size(pool.pages_in_tmem * PAGE)),
        _Column("IN FILE", "", 7, 6, lambda pool: _size(pool.pages_in_file * PAGE)),
        _Column("RATIO", "", 5, 8, lambda pool: _share(pool.compression_ratio, "{:.2f}")),
        _Column("HITS", "reads", 6, 4, _hits),
        _Column("PUTS", "/s", 5, 5, lambda pool: _rate(pool.puts)),
        _Column("REFUSED", "/s", 7, 5, lambda pool: _rate(pool.refusals, _NOTABLE)),
        _Column("SPILLED", "/s", 7, 9, lambda pool: _rate(pool.spills, _NOTABLE)),
        _Column("DEMOTED", "/s", 7, 9, lambda pool: _rate(pool.demotions)),
        _Column("FILE", "reads/s", 7, 5, lambda pool: _rate(pool.file_reads, _NOTABLE)),
        _Column("PUT", "median   p99", 12, 13, lambda pool: _latency(pool.put_seconds)),
        _Column("GET", "median   p99", 12, 11, lambda pool: _latency(pool.get_seconds)),
        _Column("SPILL", "median   p99", 12, 14, lambda pool: _latency(pool.spill_seconds)),
        _Column("FILE READ", "median   p99", 12, 12, lambda pool: _latency(pool.file_read_seconds)),
        _Column("KIND", "", 10, 10, lambda pool: Text(pool.kind or "-", _QUIET), left=True),
        _Column("STATE", "", state, 3, _state, left=True),
    ]


def _shortened(name: str, width: int) -> str:
    """What guests' names differ in is often at their end."""
    end = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _bar(pool: Activity, scale: _Scale) -> Text:
    """What is used, and what is left up to the target, both on the scale of the largest target."""
    whole, half, unused = scale.glyphs
    used, target = (round(2 * scale.width * size / scale.nbytes) for size in (pool.used_bytes, pool.target_bytes))
    inside = min(used, target) // 2
    colour = "cyan" if "frozen" in pool.warnings else "green"
    text = Text(no_wrap=True, end="")
    text.append(whole * inside, colour)
    text.append(whole * (used // 2 - inside) + half * (used % 2), _NOTABLE if used > target else colour)
    text.append(unused * max(0, (target + 1) // 2 - len(text)), _QUIET)
    return text


def _size(nbytes: int) -> Text:
    return Text(format_size(nbytes), "" if nbytes else _QUIET)


def _share(value: float | None, form: str, style: str = "") -> Text:
    return Text("-", _QUIET) if value is None else Text(form.format(value), style)


def _hits(pool: Activity) -> Text:
    good = pool.hit_share is None or pool.hit_share >= _GOOD_HIT_SHARE
    return _share(pool.hit_share, "{:.1%}", "" if good else _NOTABLE)


def _rate(value: float, style: str = "") -> Text:
    return Text(format_count(value), style if value else _QUIET)


def _latency(latency: Latency) -> Text:
    median, p99 = format_seconds(latency.median), format_seconds(latency.p99)
    return Text(f"{median:>6}{p99:>6}", _QUIET if latency.median is None else "")


def _state(pool: Activity) -> Text:
    text = Text(", ".join(pool.warnings) or pool.state, "" if pool.warnings else _QUIET)
    text.highlight_words(["frozen"], "cyan")
    text.highlight_words(["idle"], _QUIET)
    text.highlight_words(["never trims", "takes more", "unfinished"], _NOTABLE)
    text.highlight_words(["damaged", "lost pages", "bad checksums", "I/O errors"], _GRAVE)
    return text
