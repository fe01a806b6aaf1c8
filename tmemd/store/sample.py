"""One pool at one moment: what the governor reads, recordings keep, and policies are replayed over."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd.store.poolfile import GENERATIONS, Ages, Counters

_NONE: Final = (0,) * GENERATIONS
NO_AGES: Final = Ages(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, 0)  # of a pool whose ages are not known


class PoolSample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Sizes in bytes. Everything that counts is counted since the pool was made."""

    name: str
    weight: int
    minimum_bytes: int  # what it may not be pushed below: the user's setting
    cap_bytes: int | None  # the user's setting; None: none
    target_bytes: int
    frozen: bool
    served: bool
    has_file: bool
    is_ephemeral: bool = False
    counters: Counters
    ages: Ages
