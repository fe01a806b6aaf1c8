# SPDX-License-Identifier: BSD-3-Clause
"""How much RAM all pools together may take, from one tick to the next. Pure: no I/O, no clock.

`used + spare` hardly changes while pools demote, for what they give back becomes available: so it says what the pools
may take however much of an earlier decision has not been carried out yet, and nothing is asked for twice. Pressure
knows no such sum, nor whose limit it was that somebody waited at: it only counts near the reserve, takes no more than
leads away from there, and asks again only when what it asked for before has been given.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

import msgspec

# Share of RAM within which the ceiling may move before anything is done about it. (MemAvailable of a host of 24 GiB
# that builds and tests moves by 13 MiB from one tick to the next in the median, seldom by more than 60.)
BAND: Final = 1 / 100
# Share of the maximum that is given in one tick: all of it in eight seconds.
GROWTH: Final = 1 / 16
# Share of what pools use that pressure takes in one go, however high it is.
CUT: Final = 1 / 8
# Share of RAM above the reserve within which pressure counts. (On the recorded host, without any reserve, tasks waited
# for a tenth of a tick in none of 1,162 with 8 % of RAM available or more, and in 13 of 84 with less.)
NEAR: Final = 1 / 20
# Only what was there for so many ticks is given. Each time it turns out to have been too early they double.
HOLD_MIN: Final = 4
HOLD_MAX: Final = 64
# After this many times the hold without a shrink, the hold is halved.
_CALM: Final = 4


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the administrator set."""

    minimum: int  # bytes; however short the host is
    maximum: int  # bytes
    pressure: float  # share of the time that tasks may wait for memory


class MemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """How short of memory the host is, or its tightest cgroup, at one tick. Sizes in bytes."""

    total: int  # RAM
    spare: int  # what is available beyond the reserve; negative: what it lacks
    used: int  # by all pools
    pressure: float = 0.0  # share of the last tick that tasks waited for memory

    @property
    def nearness(self) -> int:
        """Bytes that are missing for pressure not to count."""
        return max(int(self.total * NEAR) - self.spare, 0)


class Budget:
    """The budget as it develops."""

    def __init__(self, limits: Limits, start: int | None = None) -> None:
        """Begin with *start* bytes, what targets add up to already; None: with what there is room for."""
        self.limits = limits
        self._bytes = start
        self.change = 0  # bytes, in the last step
        self.cause = ""  # why
        self._ceilings: deque[int] = deque(maxlen=HOLD_MAX)  # of the last ticks; what the budget might grow to
        self._hold = HOLD_MIN
        self._calm = 0  # ticks since the last shrink
        self._growing = False
        self._grew = False  # since the last shrink

    @property
    def bytes(self) -> int:
        """What holds since the last step."""
        return self._bytes or 0

    def step(self, now: MemoryState) -> int:
        """The budget from now on, in bytes: taken back at once, given step by step, left alone in between.

        Between the ceiling (all that leaves the reserve alone) and a band below it nothing moves: changes of what is
        available that are smaller than the band, those by pools among them, end in the same budget.
        """
        band = int(now.total * BAND)
        ceiling = now.used + now.spare
        known = ceiling - band // 2 if self._bytes is None else self._bytes
        before = self._clamp(known)
        unreserved = ceiling - band // 2 if ceiling < before else before
        squeezed = self._squeezed(before, now)
        wanted = self._clamp(min(unreserved, squeezed))
        self.cause = "budget" if wanted == before else "reserve" if unreserved <= squeezed else "pressure"
        strained = wanted < before or self._is_strained(now)
        self._ceilings.append(min(ceiling, wanted) if strained else ceiling)
        self._count(shrunk=wanted < before)
        room = min(islice(reversed(self._ceilings), self._hold)) - wanted
        self._growing = wanted < self.limits.maximum and room > (band // 2 if self._growing else band)
        if self._growing:
            self._grew = True
            wanted = self._clamp(wanted + min(int(self.limits.maximum * GROWTH), room - band // 2))
        self._bytes, self.change = wanted, wanted - known
        return wanted

    def _clamp(self, nbytes: int) -> int:
        return max(self.limits.minimum, min(nbytes, self.limits.maximum))

    def _is_strained(self, now: MemoryState) -> bool:
        """Whether there is too much pressure to give anything; a limit of all the time stands for none."""
        return self.limits.pressure / 2 < now.pressure and self.limits.pressure < 1 and now.nearness > 0

    def _squeezed(self, before: int, now: MemoryState) -> int:
        """What pressure leaves: less by as much as it is above the limit, as Senpai's backoff goes by the excess.

        Nothing while pools still owe what was asked for before.
        """
        excess = now.pressure - self.limits.pressure
        if excess <= 0 or now.used > before or not now.nearness:
            return before
        return now.used - min(int(now.used * min(CUT, excess)), now.nearness)

    def _count(self, *, shrunk: bool) -> None:
        """Let the hold follow how often growth was too early."""
        if shrunk:
            if self._grew:
                self._hold = min(2 * self._hold, HOLD_MAX)
            self._calm, self._grew = 0, False
            return
        self._calm += 1
        if self._calm >= _CALM * self._hold:
            self._hold, self._calm = max(self._hold // 2, HOLD_MIN), 0
