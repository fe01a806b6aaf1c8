# SPDX-License-Identifier: BSD-3-Clause
"""How much demotion may write to backing files, for flash wears: a token bucket that all pools share. Pure.

The tokens lie in the control pages themselves: what a pool was granted and has not used. So they outlive tmemd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from tmemd.store.poolfile import PAGE

# Of an hour's writes, what may be saved up. The rest comes in evenly, so that no hour sees more than is allowed.
BURST: Final = 1 / 4
_HOUR: Final = 3600.0  # seconds


class Writer(msgspec.Struct, frozen=True, gc=False):
    """A pool that demotion may write for."""

    written: int  # pages that demotion has written since the pool was made
    wants: int  # bytes by which it is over its target
    bound: int | None  # what holds now: pages it may have written in all; None: no bound


class WriteAllowance:
    """The bucket."""

    def __init__(self, per_hour: int, left: float | None = None) -> None:
        """*per_hour* bytes may be written; *left* pages (None: as much as can be saved up) are there to begin with."""
        self.per_hour = per_hour
        self._rate = per_hour / PAGE * (1 - BURST) / _HOUR
        self._most = per_hour / PAGE * BURST
        self._left = self._most if left is None else min(left, self._most)

    @property
    def left_bytes(self) -> int:
        """What may be written now."""
        return int(self._left) * PAGE

    def pass_time(self, seconds: float, written: int) -> None:
        """Let tokens come in, and take those for *written* pages; what was written unbidden leaves no debt."""
        self._left = max(min(self._left + self._rate * seconds, self._most) - written, 0.0)

    def share(self, writers: Sequence[Writer]) -> list[int]:
        """The bound of each: half of what is left to all alike, half in proportion to what each is over its target.

        Together they are never more than what is left. A bound that would rise by little stays as it is.
        """
        wanted = sum(writer.wants for writer in writers)
        alike = self._left / (2 if wanted else 1) / max(len(writers), 1)
        return [
            _bound(writer, int(alike + (self._left / 2 * writer.wants / wanted if wanted else 0))) for writer in writers
        ]


def _bound(writer: Writer, granted: int) -> int:
    new, old = writer.written + granted, writer.bound
    return old if old is not None and old <= new <= old + granted // 8 else new


def granted(writers: Sequence[Writer]) -> float | None:
    """The pages that were granted and not written yet: what a tmemd before left; None: nothing was ever granted."""
    left = [max(writer.bound - writer.written, 0) for writer in writers if writer.bound is not None]
    return float(sum(left)) if left else None
