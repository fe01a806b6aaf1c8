"""Our policy: what is hot is kept in RAM before what is cold, whoever owns it; within that, weights decide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from tmemd.policy.demand import Demand
from tmemd.policy.share import share
from tmemd.poolfile import GENERATIONS

# The hottest tier is of the pages used in so many generations, the last of which has only begun: 10 to 15 seconds.
# In it weights alone decide. Costs, while it was tuned, of phased, skewed and idle-giant with 2: 8.7, 11.7, 4.6;
# with 3: 8.7, 11.7, 4.3; with 4: 9.8, 11.6, 5.1; with 5: 10.2, 11.7, 5.3.
_HOT: Final = 3
# Room for what is put, or read from the file and put again, in so many ticks of 0.5 s: there is a new survey after two,
# and a new target after one more.
_TICKS_AHEAD: Final = 4
# One more part in so many for each pool, so that it need not demote or compact to hold what it wants.
_SLACK: Final = 16
# The part of the budget that all pools together have for a start, whether or not they use it.
_START: Final = 16


def fair(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Fill tier after tier, each with pages last used longer ago, until the budget does not reach.

    In that tier nobody gets less than for the tiers before, nor more than it wants, and what each pool has in all is in
    proportion to its weight as far as these bounds allow. A pool of twice the weight of the lightest has in each tier
    pages that were last used twice as long ago. The last tier is of what nobody wants now: headroom, up to the caps.
    """
    if not demands:
        return {}
    weights = [demand.weight for demand in demands]
    floors = [demand.minimum for demand in demands]
    start, lightest = budget // (_START * len(demands)), min(weights)
    for wants in zip(*(_wants(demand, start, lightest) for demand in demands), strict=True):
        ceilings = [
            max(floor, min(want, demand.cap)) for demand, floor, want in zip(demands, floors, wants, strict=True)
        ]
        if sum(ceilings) >= budget:
            break
        floors = ceilings
    targets = share(budget, weights, floors, ceilings)
    return {demand.name: target for demand, target in zip(demands, targets, strict=True)}


def _wants(demand: Demand, start: int, lightest: int) -> list[int]:
    """The bytes a pool wants for each tier, and at last its cap.

    It wants no more than it can fill until the next targets: what others would demote for more than that is lost.
    """
    more = start + (demand.puts + demand.file_reads) * _TICKS_AHEAD * demand.page_bytes
    warm = list(accumulate(demand.heat, initial=demand.overhead))
    tiers = [_warmer(warm, generations * demand.weight, lightest) for generations in range(_HOT, GENERATIONS)]
    wants = [min(pages, demand.used) for pages in tiers] + [demand.used]
    return [pages + pages // _SLACK + more for pages in wants] + [demand.cap]


def _warmer(warm: Sequence[int], numerator: int, denominator: int) -> int:
    """The bytes of pages last used in so many generations, a fraction; *warm*: in none, in one, in two..."""
    whole, part = divmod(numerator, denominator)
    if whole >= GENERATIONS - 1:
        return warm[GENERATIONS - 1]
    return warm[whole] + (warm[whole + 1] - warm[whole]) * part // denominator
