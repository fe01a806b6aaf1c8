# SPDX-License-Identifier: BSD-3-Clause
"""One pool at one moment: what the governor reads, recordings keep, and policies are replayed over."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd.store.poolfile import GENERATIONS, Ages, Counters

_NONE: Final = (0,) * GENERATIONS
NO_AGES: Final = Ages(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, 0)  # of a pool whose ages are not known


class PoolSample(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
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
    file_read_ns: int = 0  # spent on reading pages from the file; recordings have it beside the sample
    counters: Counters
    ages: Ages
