# SPDX-License-Identifier: BSD-3-Clause
"""A made-up life of a device: what happens to it, step by step, and what goes wrong."""

from __future__ import annotations

import enum
import random
from collections.abc import Set
from dataclasses import dataclass, replace

from tests.support.content import PAGE, content
from tests.support.harness import MIB

SIZE = 96 * MIB
# Pages at both ends of regions of the bitmap, so that some regions are clean while others are not, and some of which
# half are written through: requests for these are several runs.
NEIGHBOURS = 16
PAGES = [first + n for first in (0, 8192 - 8, SIZE // PAGE - 128 - 8, SIZE // PAGE - 16) for n in range(NEIGHBOURS)]


class Act(enum.IntEnum):
    """What can happen to a device."""

    WRITE = 0
    PART = 1
    TRIM = 2
    ZERO = 3
    FLUSH = 4
    DEMOTE = 5
    DRAIN = 6
    FREEZE = 7
    THAW = 8
    CACHE = 9
    REATTACH = 10
    READ = 11
    SERVER_GOES = 12  # and comes back when it is told to
    SERVER_COMES = 13
    LOOK_AFTER = 14  # the device connects again, and writes back what lies in the overflow file
    DISK_FULL = 15  # that of this host: what its files have no blocks for cannot be written
    DISK_FREED = 16


_WEIGHTS = {
    Act.WRITE: 40, Act.PART: 6, Act.TRIM: 6, Act.ZERO: 6, Act.FLUSH: 8, Act.DEMOTE: 5, Act.DRAIN: 3, Act.FREEZE: 5,
    Act.THAW: 5, Act.CACHE: 3, Act.REATTACH: 2, Act.READ: 12, Act.DISK_FULL: 2, Act.DISK_FREED: 4,
}  # fmt: skip
_FAR_WEIGHTS = _WEIGHTS | {Act.SERVER_GOES: 4, Act.SERVER_COMES: 20, Act.LOOK_AFTER: 6}
_CHANGES = {Act.WRITE, Act.PART, Act.TRIM, Act.ZERO}
_BESIDE_WRITERS = {Act.FLUSH, Act.DEMOTE, Act.DRAIN, Act.REATTACH}


@dataclass(frozen=True)
class Step:
    """One step; a request is for *length* bytes at *offset*, and leaves *data* there if it is to change them.

    A FLUSH, DEMOTE or DRAIN with data is one beside which another thread writes that data, at least once. Before a
    REATTACH writes of its data are sent by the virtio door; by another it has none.
    """

    act: Act
    offset: int = 0
    length: int = 0
    data: bytes = b""
    fua: bool = False

    @property
    def pages(self) -> range:
        """The pages it is for."""
        return range(self.offset // PAGE, -(-(self.offset + self.length) // PAGE))

    @property
    def changes(self) -> range:
        """The pages it changes."""
        return self.pages if self.data else range(0)

    @property
    def is_many(self) -> bool:
        """Whether it is several requests."""
        return bool(self.data) and self.act not in _CHANGES

    @property
    def is_whole_write(self) -> bool:
        """Whether it changes whole pages, and need not be durable when it is done."""
        return self.act in (Act.WRITE, Act.TRIM, Act.ZERO) and not self.fua

    def covers(self, page: int) -> bool:
        """Whether it leaves nothing of what *page* was."""
        return self.offset <= page * PAGE and (page + 1) * PAGE <= self.offset + self.length

    def change(self, page: int, old: bytes) -> bytes:
        """What *page* is after it that was *old* before."""
        start = page * PAGE
        first, last = max(self.offset - start, 0), min(self.offset + self.length - start, PAGE)
        return old[:first] + self.data[start + first - self.offset : start + last - self.offset] + old[last:]


def write(page: int, version: int, count: int = 1, *, fua: bool = False) -> Step:
    """Write *count* pages from *page* on."""
    data = b"".join(content(n, version) for n in range(page, page + count))
    return Step(Act.WRITE, page * PAGE, len(data), data, fua)


def zero(page: int, count: int = 1, *, act: Act = Act.ZERO, fua: bool = False) -> Step:
    """Zero *count* pages from *page* on, or trim them."""
    return Step(act, page * PAGE, count * PAGE, bytes(count * PAGE), fua)


def history(seed: int, steps: int, *, far: bool = False, vhost: bool = False) -> list[Step]:
    """*steps* steps; the same for the same arguments. *far*: a server has the file; *vhost*: by the virtio door."""
    rng, weights = random.Random(seed), _FAR_WEIGHTS if far else _WEIGHTS
    acts = rng.choices(list(weights), list(weights.values()), k=steps)
    beside = _BESIDE_WRITERS if vhost else _BESIDE_WRITERS - {Act.REATTACH}
    return [_step(rng, act, version, beside) for version, act in enumerate(acts, 1)]


def _step(rng: random.Random, act: Act, version: int, beside_writers: Set[Act]) -> Step:
    at = rng.randrange(len(PAGES))
    if rng.random() < 0.1:
        at = 0
    page = PAGES[at]
    count = rng.randint(1, min(8, NEIGHBOURS - at % NEIGHBOURS))
    fua = act in _CHANGES and rng.random() < 0.15
    if act is Act.WRITE:
        return write(page, version, count, fua=fua)
    if act in (Act.TRIM, Act.ZERO):
        return zero(page, count, act=act, fua=fua)
    if act is Act.PART:
        whole, cut = write(page, version, count), rng.randrange(1, PAGE)
        return Step(act, whole.offset + cut, whole.length - cut, whole.data[cut:], fua)
    if act in beside_writers and rng.random() < 0.3:
        return replace(write(page, version, count), act=act)
    return Step(act, page * PAGE, count * PAGE)


def faults(rng: random.Random, *, failures: bool, first: int = 0, far: bool = False) -> str:
    """What goes wrong in a life (recorder.c): most are killed, many have failures in a row, from *first* on.

    Where its file is *far*, what it sends counts, too, and connections are cut.
    """
    plan = []
    if failures and rng.random() < 0.7:
        at = first + rng.randrange(60)
        plan = [f"{number}f" for number in range(at, at + rng.choice([1, 1, 2, 3]))]
    if far:
        plan += [f"{_moment(rng)}c" for _ in range(rng.randrange(3))]
    if rng.random() < 0.8:
        plan.append(f"{_moment(rng) if far else rng.randrange(80)}{rng.choice('abss')}")
    return " ".join(plan)


def server_faults(rng: random.Random, *, failures: bool) -> str:
    """The same for a server that has a device's file: it is killed, hangs, cuts connections, is slow, and fails."""
    plan = [f"{_moment(rng)}{rng.choice('cabsABSHl')}" for _ in range(2)]
    if failures and rng.random() < 0.5:
        plan += [f"{_moment(rng)}f" for _ in range(rng.randint(1, 3))]
    return " ".join(plan)


def _moment(rng: random.Random) -> int:
    """Which operation of many: a new device has nearly a thousand before its first step."""
    return rng.randrange(rng.choice([100, 1000, 2000]))
