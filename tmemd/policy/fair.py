# SPDX-License-Identifier: BSD-3-Clause
"""Our policy: pages that are used soon again are kept in RAM, whoever owns them; within that, weights decide."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import fsum
from typing import Final, NamedTuple

from tmemd.policy.demand import FIRST_READ_SECONDS, HOT, Demand
from tmemd.policy.share import share
from tmemd.store.poolfile import GENERATIONS

# Behind each constant stands what others cost: seconds of the disk's time on the recorded phased, skewed, idle-giant,
# batch, leak, builds and scans. With those that hold it is 8.7, 11.0, 4.5, 18.2, 13.1, 13.4 and 20.2.
#
# Room for what is put in so many ticks of 0.5 s: others have to give it back first. With 2: 9.0, 10.9, 4.5, 18.0, 13.1,
# 13.2, 20.3; with 4: 8.7, 11.1, 4.7, 18.7, 13.7, 13.7, 20.6.
_TICKS_AHEAD: Final = 2.5
# The part of its share by weight that a pool has for a start, whether or not it uses it. With 16: 8.6, 11.2, 4.2, 18.3,
# 14.3, 13.5, 22.0; with 64: 9.1, 11.4, 6.6, 18.3, 13.2, 13.4, 20.7.
_START: Final = 32
# The part of its share below which a pool has room for what it reads back, too. With 0: nothing changes by 1 %, but RAM
# takes long to come back to a guest that only reads; with 2: 8.8, 11.0, 4.5, 17.9, 13.4, 13.4, 22.5.
_RETURN: Final = 3 / 4
# However seldom a pool's pages are read, it reaches back this part of the time that others do. With 0.05 leak costs
# 13.0; with 0.2 it costs 14.3, and batch 18.4.
_LEAST: Final = 0.1
# Reads of pages that are not hot: with much fewer, own and expected, a pool is taken to be as others are. With 30 leak
# costs 13.3; with 200 batch costs 18.4 and leak 14.0, with 1000 they cost 18.9 and 14.4.
_TOO_FEW: Final = 100
# What a page takes to be written to the file, of what it takes to be read: 0.33 to 1.16 in 14 recordings, 0.83 on
# average.
_WRITE: Final = 0.8
# Up to this ratio two files may lie on one disk: in 14 recordings of devices that do, reads of one took up to 2.4 times
# as long as those of another in nine ticks of ten, 3.2 at most in those that the constants here were chosen by. Behind
# it a file counts as this part of what it is further away. With one device of skewed, batch, sliding or bursts 10 or 50
# times as far, all wait 0.29 to 0.97 of what they did without that (median 0.86); with 3: 0.29 to 0.98 (0.86).
_SAME: Final = 4
# However far a file is, or seems to be while it hangs, its pool reaches back so many times as far as one beside it.
# With 16: 0.29 to 0.97 (0.87); with 2: 0.34 to 0.98 (0.88).
_MOST: Final = 8.0
# Where the lightest pools, or those with the nearest files, have less than this part of all pages, the next sets the
# scale. Recordings have one weight.
_FEW_PAGES: Final = 16


class Reach(NamedTuple):
    """How far back in time a pool reaches for a generation of the lightest: among its hot pages, and behind these."""

    hot: float
    warm: float


def fair(demands: Sequence[Demand], budget: int) -> dict[str, int]:
    """Fill tier after tier, each with pages last used longer ago, until the budget does not reach.

    In that tier nobody gets less than for the tiers before, nor more than it wants, and what each pool has in all is in
    proportion to its weight as far as these bounds allow. How long ago a tier reaches is a pool's own: twice as long
    where its weight is twice that of the lightest, less where its pages are seldom read, or read again at little cost.
    Of pages last used at the same time those of ephemeral pools come a tier later. The last tier is of what nobody
    wants now, up to the caps.
    """
    if not demands:
        return {}
    weights = [demand.weight for demand in demands]
    floors = [demand.minimum for demand in demands]
    costs = _costs(demands)
    rooms = _rooms(demands, costs, budget)
    for wants in zip(*map(_wants, demands, rooms, _reaches(demands, costs)), strict=True):
        ceilings = [
            max(floor, min(want, demand.cap)) for demand, floor, want in zip(demands, floors, wants, strict=True)
        ]
        if sum(ceilings) >= budget:
            break
        floors = ceilings
    targets = share(budget, weights, floors, ceilings)
    return {demand.name: target for demand, target in zip(demands, targets, strict=True)}


def _rooms(demands: Sequence[Demand], costs: Sequence[float], budget: int) -> list[int]:
    """The bytes that each can fill until the next targets: what others would demote for more than that is lost.

    What is read from the file finds room only as far as the pool has less than its share: a guest that reads all it
    has, once, would otherwise take the RAM of those who read theirs again. An ephemeral pool puts nothing else. Where
    the file is far both reach further, or nothing would come back beyond what the device keeps free for writes.
    """
    unit = budget / sum(demand.weight for demand in demands)
    rooms = []
    for demand, cost in zip(demands, costs, strict=True):
        own, ahead, far = unit * demand.weight, _TICKS_AHEAD * demand.page_bytes, max(1.0, cost)
        back = min(demand.file_reads * ahead * far, own * _RETURN * far - demand.used)
        puts = 0 if demand.is_ephemeral else demand.puts
        rooms.append(int(own / _START + puts * ahead + max(back, 0.0)))
    return rooms


def _wants(demand: Demand, room: int, reach: Reach) -> Iterator[int]:
    """The bytes a pool wants for each tier, and at last its cap. Most are never asked for."""
    warm = list(accumulate(demand.heat, initial=demand.overhead))
    hot = HOT * reach.hot
    if demand.is_ephemeral:
        yield demand.minimum
    for generations in range(GENERATIONS - HOT):
        yield min(_warmer(warm, hot + generations * reach.warm), demand.used) + room
    if not demand.is_ephemeral:
        yield demand.used + room
    yield demand.used + room
    yield _warmer(warm, hot) + room
    yield warm[-1] + room
    yield demand.cap


def _reaches(demands: Sequence[Demand], costs: Sequence[float]) -> list[Reach]:
    """In proportion to weight, what a miss costs, and how often pages that are not hot are read, a byte, up to others'.

    A guest's hot pages count for less only if it also reads less than it puts, as a job or a leak does.
    """
    reads = fsum(demand.use.warm_reads for demand in demands)
    held = fsum(demand.use.warm_bytes for demand in demands)
    lightest = _lightest(demands)
    reaches = []
    for demand, cost in zip(demands, costs, strict=True):
        use, weight = demand.use, demand.weight / lightest * cost
        expected = reads * (use.warm_bytes / held) if held else 0.0
        warm = (use.warm_reads + _TOO_FEW) / (expected + _TOO_FEW)
        hot = max(warm, use.reads / use.puts) if use.puts else 1.0
        reaches.append(Reach(weight * max(_LEAST, min(1.0, hot)), weight * max(_LEAST, min(1.0, warm))))
    return reaches


def _costs(demands: Sequence[Demand]) -> list[float]:
    """What it costs to take a page and need it again, as a part of what it costs where the file is near.

    That of a persistent pool is a write and a read, that of an ephemeral pool a read of its source. Where there is no
    persistent pool the dearest source sets the scale.
    """
    if all(demand.is_ephemeral for demand in demands):
        dearest = max(demand.read_seconds for demand in demands)
        return [max(_LEAST, demand.read_seconds / dearest) for demand in demands]
    near = _near(demands)
    far = [1.0 if demand.read_unknown else _distance(demand.read_seconds / near) for demand in demands]
    others = [demand.read_seconds / each for demand, each in zip(demands, far, strict=True) if not demand.is_ephemeral]
    whole = fsum(others) / len(others) * (1 + _WRITE)
    return [
        max(_LEAST, min(demand.read_seconds / whole, 1.0), each / (1 + _WRITE) if each > 1 else 0.0)
        if demand.is_ephemeral
        else each
        for demand, each in zip(demands, far, strict=True)
    ]


def _near(demands: Sequence[Demand]) -> float:
    """Seconds that a page takes to be read from the nearest file, but for pools too small to set the scale.

    Files that nothing was read from yet do not count.
    """
    known = [demand for demand in demands if not (demand.is_ephemeral or demand.read_unknown)]
    return _least([(demand.read_seconds, sum(demand.heat)) for demand in known]) if known else FIRST_READ_SECONDS


def _distance(ratio: float) -> float:
    """What a read costs, of what one of the nearest file does: what may be the same disk is taken to be."""
    return max(1.0, min(ratio / _SAME, _MOST))


def _lightest(demands: Sequence[Demand]) -> float:
    """The least weight, but for pools that together have so few pages that they cannot set the scale for the others."""
    return _least([(demand.weight, sum(demand.heat)) for demand in demands])


def _least(values: Sequence[tuple[float, int]]) -> float:
    """The least of these, each with the bytes of pages behind it, but for those behind which there are few of all."""
    ordered = sorted(values)
    pages = list(accumulate(nbytes for _, nbytes in ordered))
    return ordered[bisect_right(pages, pages[-1] // _FEW_PAGES)][0] if pages[-1] else ordered[0][0]


def _warmer(warm: Sequence[int], generations: float) -> int:
    """The bytes of pages last used in so many generations; *warm*: in none, in one, in two..."""
    whole = int(generations)
    if whole >= GENERATIONS - 1:
        return warm[GENERATIONS - 1]
    return warm[whole] + int((warm[whole + 1] - warm[whole]) * (generations - whole))
