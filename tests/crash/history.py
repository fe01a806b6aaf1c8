"""A made-up life of a device, the same in the process that lives it and in the one that judges what is left of it."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from tests.content import PAGE, content
from tests.harness import MIB
from tests.model.reference import Reference

SIZE = 160 * MIB
# Pages at both ends of several granules of the map, so that some granules are clean while others are not.
PAGES = [first + n for first in (0, 8192 - 8, 16384 - 8, SIZE // PAGE - 16) for n in range(16)]


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


_WEIGHTS = {
    Act.WRITE: 40, Act.PART: 6, Act.TRIM: 6, Act.ZERO: 6, Act.FLUSH: 8, Act.DEMOTE: 5, Act.DRAIN: 3, Act.FREEZE: 5,
    Act.THAW: 5, Act.CACHE: 3, Act.REATTACH: 2,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step; a request is for *length* bytes at *offset*."""

    act: Act
    offset: int
    length: int
    data: bytes

    def happen_to(self, reference: Reference) -> None:
        """What it does to the content."""
        if self.act in (Act.WRITE, Act.PART):
            reference.write(self.offset, self.data)
        elif self.act in (Act.TRIM, Act.ZERO):
            reference.zero(self.offset, self.length)


def history(seed: int, steps: int, *, parts: bool = True) -> list[Step]:
    """*steps* steps; the same for the same arguments. *parts*: whether parts of pages are written."""
    rng = random.Random(seed)
    weights = {act: weight for act, weight in _WEIGHTS.items() if parts or act is not Act.PART}
    return [_step(rng, weights, version) for version in range(1, steps + 1)]


def _step(rng: random.Random, weights: dict[Act, int], version: int) -> Step:
    act = rng.choices(list(weights), list(weights.values()))[0]
    at = rng.randrange(len(PAGES))
    if rng.random() < 0.1:
        at = 0
    page = PAGES[at]
    count = rng.randint(1, min(8, 16 - at % 16))
    data = b"".join(content(n, version) for n in range(page, page + count))
    if act is Act.PART:
        cut = rng.randrange(1, PAGE)
        return Step(act, page * PAGE + cut, len(data) - cut, data[cut:])
    return Step(act, page * PAGE, len(data), data)
