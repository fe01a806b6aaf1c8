"""Our policy: what is hot is kept in RAM before what is cold, whoever owns it; within that, weights decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from tmemd.policy.demand import Demand
from tmemd.policy.share import share
from tmemd.store.poolfile import GENERATIONS

# Tuned on the recorded phased, skewed, idle-giant, batch and leak, which cost 8.7, 11.0, 4.1, 19.0 and 14.9 seconds of
# the disk's time with these constants.
#
# The hottest tier is of the pages used in so many generations, the last of which has only begun: 10 to 15 seconds.
# In it weights alone decide. With 2 or 4 nothing changes by more than 0.2.
_HOT: Final = 3
# Room for what is put, or read from the file and put again, in so many ticks of 0.5 s: there is a new survey after two,
# and a new target after one more. With 2: 9.1, 10.9, 4.0, 18.6, 14.5; with 4: 8.7, 11.1, 4.4, 19.1, 15.2.
_TICKS_AHEAD: Final = 3
# The part of the budget that all pools together have for a start, whether or not they use it. With 16: 8.8, 11.2, 4.3,
# 19.1, 15.6; with 64: 8.8, 10.9, 4.1, 19.1, 14.2, but RAM does not follow weights where pages are seldom used.
_START: Final = 32
# A guest that reads less than it puts, a job or a leak, reaches back less in time, down to this part; but only so far
# as it has put so many pages, for each begins with writing. Without: 8.6, 11.1, 4.1, 20.2, 14.6.
_LEAST_REUSE: Final = 0.3
_PAGES_TO_TELL: Final = 30_000


def fair(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Fill tier after tier, each with pages last used longer ago, until the budget does not reach.

    In that tier nobody gets less than for the tiers before, nor more than it wants, and what each pool has in all is in
    proportion to its weight as far as these bounds allow. A pool of twice the weight of the lightest has in each tier
    pages that were last used twice as long ago, one that seldom reads what it put pages used more lately. The last tier
    is of what nobody wants now: headroom, up to the caps.
    """
    if not demands:
        return {}
    weights = [demand.weight for demand in demands]
    floors = [demand.minimum for demand in demands]
    start = budget // (_START * len(demands))
    reuses = list(map(_reuse, demands))
    most = min(weights) * max(reuses)
    reaches = [weight * reuse / most for weight, reuse in zip(weights, reuses, strict=True)]
    for wants in zip(
        *(_wants(demand, start, reach) for demand, reach in zip(demands, reaches, strict=True)), strict=True
    ):
        ceilings = [
            max(floor, min(want, demand.cap)) for demand, floor, want in zip(demands, floors, wants, strict=True)
        ]
        if sum(ceilings) >= budget:
            break
        floors = ceilings
    targets = share(budget, weights, floors, ceilings)
    return {demand.name: target for demand, target in zip(demands, targets, strict=True)}


def _wants(demand: Demand, start: int, reach: float) -> Iterator[int]:
    """The bytes a pool wants for each tier, and at last its cap. Most are never asked for.

    It wants no more than it can fill until the next targets: what others would demote for more than that is lost.
    """
    more = start + (demand.puts + demand.file_reads) * _TICKS_AHEAD * demand.page_bytes
    warm = list(accumulate(demand.heat, initial=demand.overhead))
    for generations in range(_HOT, GENERATIONS):
        yield min(_warmer(warm, generations * reach), demand.used) + more
    yield demand.used + more
    yield demand.cap


def _reuse(demand: Demand) -> float:
    """Pages read for each that was put, from _LEAST_REUSE to 1."""
    return max(_LEAST_REUSE, min(1.0, (demand.read + _PAGES_TO_TELL) / (demand.put + _PAGES_TO_TELL)))


def _warmer(warm: Sequence[int], generations: float) -> int:
    """The bytes of pages last used in so many generations; *warm*: in none, in one, in two..."""
    whole = int(generations)
    if whole >= GENERATIONS - 1:
        return warm[GENERATIONS - 1]
    return warm[whole] + int((warm[whole + 1] - warm[whole]) * (generations - whole))
