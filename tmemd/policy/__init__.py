"""Policies: from the demand of each pool and a budget to a target for each. Pure: no clock, no I/O, no state.

What a policy needs to remember from one tick to the next is in the demand itself (the target that holds, the use), so
that a recorded history can be replayed through any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from tmemd.policy.demand import Demand, demand

__all__ = ["Demand", "Policy", "demand"]

# The demand of each pool and the budget in bytes -> each pool's target in bytes, by name. The sum of targets is at most
# the budget, or the sum of minimums where that is more; no target is below its pool's minimum or above its cap.
Policy: TypeAlias = Callable[[Sequence[Demand], int], dict[str, int]]
