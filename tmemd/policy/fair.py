"""Our policy: what is hot is kept in RAM before what is cold, whoever owns it; within that, weights decide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from tmemd.policy.demand import Demand
from tmemd.policy.share import share

# Tiers, hottest first: pages last used in so many generations. A page just used is of age 1 when the next generation
# begins, so the first tier is of what was used in the last one to two of them.
_TIERS: Final = (2, 4, 8)
# Heat is surveyed once a second: room for what is put in the two ticks until the next survey and the next target.
_TICKS_AHEAD: Final = 2
# Of its records' bytes, how much more a pool may take so that it need not demote or compact to hold them.
_SLACK: Final = 1 / 16


def fair(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Fill tier after tier, each with the pages of a certain heat, until the budget does not reach.

    In that tier nobody gets less than for the tiers before, nor more than it wants, and what each pool has in all is in
    proportion to its weight as far as these bounds allow. The last tier is of what nobody wants now: headroom, up to
    the caps.
    """
    weights = [demand.weight for demand in demands]
    floors = [demand.minimum for demand in demands]
    for wants in zip(*map(_wants, demands), strict=True):
        ceilings = [
            max(floor, min(want, demand.cap)) for demand, floor, want in zip(demands, floors, wants, strict=True)
        ]
        if sum(ceilings) >= budget:
            break
        floors = ceilings
    targets = share(budget, weights, floors, ceilings if demands else [])
    return {demand.name: target for demand, target in zip(demands, targets, strict=True)}


def _wants(demand: Demand) -> list[int]:
    """The bytes a pool wants for each tier, and at last its cap."""
    growth = demand.puts * _TICKS_AHEAD * demand.page_bytes
    warm = list(accumulate(demand.heat, initial=demand.overhead))
    tiers = [min(warm[ages], demand.live) for ages in _TIERS] + [demand.live]
    return [int(want * (1 + _SLACK)) + growth for want in tiers] + [demand.cap]
