# SPDX-License-Identifier: BSD-3-Clause
"""What a pool would do under a target: a model of the store, in pages by age, for `tmemd.simulation.simulate`.

It follows the device's own rules (device/maintenance.py; demote.c, promote.c, admit.c in core) in expected values:
pages of the same age are alike, so that a read of one meets RAM as often as pages of that age are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from tmemd.binding._core import PROMOTE_AGE
from tmemd.device.watermark import DEFAULT_PERCENT, MIN_AGE, FreeWatermark
from tmemd.store.poolfile import GENERATIONS, Counters

# Pages a second that one pool moves: the most seen while the requests of three guests went to the same virtual disk.
DEMOTIONS_PER_SECOND: Final = 8000
# While less of the target is free nothing is promoted. A device leaves a 256th (core/budget.c); it left a 32nd when
# policies were tuned with this model and the figures of docs/policies.md made.
PROMOTE_ROOM: Final = 1 / 32
LOT: Final = 1 / 16  # in a full pool, of copies of pages that were not used for long, or ever (core/admit.c)

_DIRTY, _CLEAN, _FILE = range(3)


def _nearest(age: int) -> tuple[int, ...]:
    return tuple(sorted(range(GENERATIONS), key=lambda other: abs(other - age)))


# Which ages to look at when pages of one are not there.
_NEAREST: Final = tuple(map(_nearest, range(GENERATIONS)))


@dataclass
class Counts:
    """Pages, as a model expects them."""

    puts: float = 0
    spills: float = 0
    gets: float = 0
    file_reads: float = 0
    demotions: float = 0
    demotion_writes: float = 0
    promotions: float = 0
    invalidates: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Flow:
    """What the guest asked for in a stretch of time, wherever its pages were: pages, and by age where that matters."""

    puts: float  # that need memory: pages of zeros do not
    freed: Sequence[float]
    reads: Sequence[float]


@dataclass(frozen=True)
class Space:
    """What there is for pages."""

    target: int  # bytes
    index: int  # of these, what is no memory for pages
    page: float  # bytes that one takes
    frozen: bool = False

    @property
    def pages(self) -> float:
        """How many there may be."""
        return max(0.0, (self.target - self.index) / self.page)


_NO_COUNTERS: Final = Counters(*[0] * (len(Counters.__struct_fields__) - 2))


def _nothing() -> list[list[float]]:
    return [[0.0] * GENERATIONS for _ in range(3)]


@dataclass
class Store:
    """The pages of one pool: in RAM only, in RAM and the same in the file, in the file; each by age."""

    pages: list[list[float]] = field(default_factory=_nothing)
    counts: Counts = field(default_factory=Counts)
    back: float = 0  # pages that were read from the file so soon that they belong in RAM
    watermark: FreeWatermark = field(default_factory=lambda: FreeWatermark(DEFAULT_PERCENT))

    @property
    def in_ram(self) -> float:
        """Pages in RAM."""
        return sum(self.pages[_DIRTY]) + sum(self.pages[_CLEAN])

    @property
    def in_file(self) -> float:
        """Pages in the file only."""
        return sum(self.pages[_FILE])

    def ram_by_age(self) -> list[float]:
        """Pages in RAM, by age."""
        return [dirty + clean for dirty, clean in zip(self.pages[_DIRTY], self.pages[_CLEAN], strict=True)]

    def age(self) -> None:
        """A generation ends."""
        for row in self.pages:
            row[-1] += row[-2]
            row[1:-1] = row[:-2]
            row[0] = 0.0

    def apply(self, flow: Flow, space: Space) -> None:
        """What the guest does in a stretch of time."""
        for age, n in enumerate(flow.reads):
            if n:
                self._read(age, n, space)
        for age, n in enumerate(flow.freed):
            if n:
                dirty, clean, _ = self._take(age, n)
                self.counts.invalidates += dirty + clean
        self.counts.puts += flow.puts
        self._put(flow.puts, space)

    def _put(self, n: float, space: Space) -> None:
        room = 0.0 if space.frozen else max(0.0, space.pages - self.in_ram)
        stored = min(n, room)
        self.pages[_DIRTY][0] += stored
        self.pages[_FILE][0] += n - stored
        self.counts.spills += n - stored

    def maintain(self, space: Space, seconds: float) -> None:
        """What the device does in that time: keep to its target, and room for pages to come."""
        most = DEMOTIONS_PER_SECOND * seconds
        over = self.in_ram - space.pages
        if over > 0:
            self.demote(min(over, most))
            return
        counts = self.counts
        counters = msgspec.structs.replace(
            _NO_COUNTERS,
            puts=int(counts.puts),
            puts_refused=int(counts.spills),
            invalidates=int(counts.invalidates),
            used_bytes=math.ceil(space.index + self.in_ram * space.page),
            pages_in_tmem=int(self.in_ram),
        )
        missing = self.watermark.missing(counters, int(self.back), space.target)
        if missing and not space.frozen:
            self.demote(min(missing / space.page, most), MIN_AGE)

    def demote(self, n: float, min_age: int = 0) -> None:
        """Move the *n* oldest pages to the file; those it has already are not written again."""
        for age in range(GENERATIONS - 1, min_age - 1, -1):
            dirty, clean = self.pages[_DIRTY][age], self.pages[_CLEAN][age]
            if n <= 0 or not dirty + clean:
                continue
            part = min(1.0, n / (dirty + clean))
            self.pages[_DIRTY][age] -= dirty * part
            self.pages[_CLEAN][age] -= clean * part
            self.pages[_FILE][age] += (dirty + clean) * part
            self.counts.demotions += (dirty + clean) * part
            self.counts.demotion_writes += dirty * part
            n -= (dirty + clean) * part

    def _read(self, age: int, n: float, space: Space) -> None:
        """Pages that are read are young afterwards; one that was in the file is put again where there is room."""
        if age == 0:
            self._reread(n, space)
            return
        dirty, clean, in_file = self._take(age, n)
        self.pages[_DIRTY][0] += dirty
        self.counts.gets += dirty + clean
        self.pages[_CLEAN][0] += clean
        self.counts.file_reads += in_file
        self.pages[_FILE][0] += in_file
        self._miss(age, in_file, space)

    def _miss(self, age: int, n: float, space: Space) -> None:
        """Pages of that age were read from the file."""
        if age < PROMOTE_AGE:
            self.back += n
            self._promote(n, space)

    def _reread(self, n: float, space: Space) -> None:
        """Read young pages: one may be read any number of times, but from the file only until it is put again."""
        there = sum(row[0] for row in self.pages)
        if not there:
            self.counts.gets += n
            return
        in_file = self.pages[_FILE][0]
        once = in_file * -math.expm1(-n / there)
        promoted = self._promote(once, space)
        # Of those that found no room, every read is one of the file.
        missed = promoted + (n * in_file / there) * (1 - promoted / once if once else 0)
        self.counts.file_reads += missed
        self.back += missed
        self.counts.gets += max(0.0, n - missed)

    def _promote(self, n: float, space: Space) -> float:
        room = space.pages - space.target * PROMOTE_ROOM / space.page - self.in_ram
        n = 0.0 if space.frozen else max(0.0, min(n, room, self.pages[_FILE][0]))
        self.pages[_FILE][0] -= n
        self.pages[_CLEAN][0] += n
        self.counts.promotions += n
        return n

    def _take(self, age: int, n: float) -> tuple[float, float, float]:
        """Remove *n* pages of that age, or of the nearest there are, in proportion to where they are."""
        taken = [0.0, 0.0, 0.0]
        for near in _NEAREST[age]:
            there = sum(row[near] for row in self.pages)
            if n <= 0 or not there:
                continue
            part = min(1.0, n / there)
            for place, row in enumerate(self.pages):
                taken[place] += row[near] * part
                row[near] -= row[near] * part
            n -= there * part
        return taken[0], taken[1], taken[2]


class Copies(Store):
    """The pages of an ephemeral pool: copies in RAM, all clean, and those that are in the source alone."""

    def maintain(self, space: Space, seconds: float) -> None:  # noqa: ARG002 - at the speed of RAM
        """Keep to the target. Copies just go, and nothing is kept free for more."""
        self.demote(self.in_ram - space.pages)

    def _put(self, n: float, space: Space) -> None:
        """Pages that were written through."""
        self.pages[_FILE][0] += n
        self._admit(n, space)

    def _miss(self, age: int, n: float, space: Space) -> None:
        is_known = age < GENERATIONS - 1
        by_lot = max(min(n, space.pages - self.in_ram), n * LOT)
        self._admit(n if is_known else by_lot, space)

    def _promote(self, n: float, space: Space) -> float:
        return self._admit(n, space)

    def _admit(self, n: float, space: Space) -> float:
        """Put pages of the source that were used now, if need be in the place of older ones."""
        if space.frozen:
            return 0.0
        self.demote(self.in_ram + n - space.pages, 1)
        n = max(0.0, min(n, space.pages - self.in_ram, self.pages[_FILE][0]))
        self.pages[_FILE][0] -= n
        self.pages[_CLEAN][0] += n
        self.counts.promotions += n
        return n
