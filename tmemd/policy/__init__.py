# SPDX-License-Identifier: BSD-3-Clause
"""Policies: from the demand of each pool and a budget to a target for each. Pure: no clock, no I/O, no state.

What a policy needs to remember from one tick to the next is in the demand itself (the target that holds, the use), so
that a recorded history can be replayed through any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tmemd.policy.demand import Demand, demand
from tmemd.policy.fair import fair
from tmemd.policy.peers import SmartAlloc, greedy, reconf_static, static

__all__ = ["DEFAULT", "NAMES", "Demand", "Policy", "by_name", "demand"]

# The demand of each pool and the budget in bytes -> each pool's target in bytes, by name. The sum of targets is at most
# the budget, or the sum of minimums where that is more; no target is below its pool's minimum or above its cap.
Policy: TypeAlias = Callable[[Sequence[Demand], int], dict[str, int]]

DEFAULT: Final = "fair"
NAMES: Final = ("fair", "greedy", "static", "reconf-static", "smart-alloc:P")
_FIXED: Final[dict[str, Policy]] = {"fair": fair, "greedy": greedy, "static": static, "reconf-static": reconf_static}
_SMART_ALLOC: Final = re.compile(r"smart-alloc:(\d{1,3}(\.\d{1,6})?)", re.ASCII)


def by_name(name: str) -> Policy:
    """The policy of that name; smart-alloc's P is a percentage, as in 'smart-alloc:0.75'. Raises ValueError."""
    if name in _FIXED:
        return _FIXED[name]
    match = _SMART_ALLOC.fullmatch(name)
    if not match or not 0 < float(match[1]) <= 100:
        raise ValueError(f"{name!r} is no policy: there are {', '.join(NAMES)}, where P is above 0 and at most 100")
    return SmartAlloc(float(match[1]))
