"""One pool at one moment: what the governor reads, recordings keep, and policies are replayed over."""

from __future__ import annotations

import msgspec

from tmemd.store.poolfile import Ages, Counters


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
    counters: Counters
    ages: Ages
