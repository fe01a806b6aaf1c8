# SPDX-License-Identifier: BSD-3-Clause
"""The policies that ours is compared with, as far as a store that demotes can have them.

greedy is what Xen does by default. static, reconf-static and smart-alloc are those of L. A. Garrido, R. Nishtala and
P. Carpenter, 'SmarTmem: Intelligent Management of Transcendent Memory in a Virtualized Server', IPDPSW 2019,
doi:10.1109/IPDPSW.2019.00151. Minimums and caps are enforced with each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tmemd.policy.demand import Demand
from tmemd.policy.share import share

# Of its target, with how much of it free a pool is taken for full, and for idle. In the paper a pool is full when puts
# fail; our store demotes cold pages instead, and keeps up to a tenth free.
_FULL: Final = 1 / 8
_IDLE: Final = 3 / 16


def greedy(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Who comes first has it: free memory goes to those who put, by how fast they do, and is never taken back."""
    has = [min(max(demand.used, demand.minimum), demand.cap) for demand in demands]
    if sum(has) >= budget:
        return _targets(demands, _in_proportion(demands, budget, has))
    room = [demand.cap - used for demand, used in zip(demands, has, strict=True)]
    more = share(budget - sum(has), [max(demand.puts, 0) + 1 for demand in demands], [0] * len(has), room)
    return _targets(demands, [used + added for used, added in zip(has, more, strict=True)])


def static(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Everybody has a share by weight, whether it is used or not."""
    return _targets(demands, _by_weight(demands, budget, [demand.cap for demand in demands]))


def reconf_static(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Everybody who ever put has a share by weight; the others have their minimum."""
    ceilings = [demand.cap if demand.put else demand.minimum for demand in demands]
    return _targets(demands, _by_weight(demands, budget, ceilings))


class SmartAlloc:
    """Who puts and has no room gets *percent* of the budget more, who does not use its target loses as much of its own.

    Where the sum is above the budget all are scaled down in proportion.
    """

    def __init__(self, percent: float) -> None:
        self._percent = percent

    def __call__(self, demands: Sequence[Demand], budget: int) -> dict[str, int]:
        """The targets that follow from those that hold."""
        wanted = [min(max(self._next(demand, budget), demand.minimum), demand.cap) for demand in demands]
        return _targets(demands, _in_proportion(demands, budget, wanted))

    def _next(self, demand: Demand, budget: int) -> int:
        free = demand.target - demand.used
        if demand.refused or (demand.puts and free < demand.target * _FULL):
            return demand.target + int(budget * self._percent / 100)
        if free > demand.target * _IDLE:
            return demand.target - int(demand.target * self._percent / 100)
        return demand.target


def _by_weight(demands: Sequence[Demand], budget: int, ceilings: Sequence[int]) -> list[int]:
    weights = [demand.weight for demand in demands]
    return share(budget, weights, [demand.minimum for demand in demands], ceilings)


def _in_proportion(demands: Sequence[Demand], budget: int, wanted: Sequence[int]) -> list[int]:
    return share(budget, [max(1, want) for want in wanted], [demand.minimum for demand in demands], wanted)


def _targets(demands: Sequence[Demand], targets: Sequence[int]) -> dict[str, int]:
    return {demand.name: target for demand, target in zip(demands, targets, strict=True)}
