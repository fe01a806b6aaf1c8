# SPDX-License-Identifier: BSD-3-Clause
"""A recorded host, replayed through the budget's logic, with pools that fill and shrink at the speed of their disks.

data/pressure.csv was recorded twice a second on a host of 24 GiB without pools, while one process took most of the RAM
at once, in steps, as a sawtooth, and at random, others going on with their work: seconds, MiB of RAM, available and
free (not used: the page cache keeps it low), then the `total=` microseconds of some and full memory pressure.
"""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.series import turns
from tmemd.governor.budget import BAND, Budget, Limits, MemoryState
from tmemd.governor.host import Memory, Stalls

MIB = 1 << 20
TRACE = Path(__file__).parent / "data/pressure.csv"
TICK = 0.5
PUTS = 400 * MIB // 2  # a tick's growth, where guests want more than they can have
DEMOTION = 250 * MIB // 2  # and what is given back in one


def recorded() -> list[Memory]:
    with TRACE.open() as file:
        rows = [[float(word) for word in row] for row in csv.reader(file)]
    return [Memory(int(row[1]) * MIB, int(row[2]) * MIB, Stalls(int(row[4]), int(row[5]))) for row in rows]


def replay(history: list[Memory], limits: Limits, reserve: int) -> list[tuple[MemoryState, int]]:
    """What the budget was at each tick, and upon what."""
    budget, used, seen = Budget(limits, 0), 0, []
    for before, now in pairwise(history):
        assert before.stalls
        assert now.stalls
        stalled = (now.stalls.some_us - before.stalls.some_us) / 1e6 / TICK
        state = MemoryState(
            total=now.total, spare=now.available - used - reserve, used=used, pressure=min(stalled, 1.0)
        )
        nbytes = budget.step(state)
        seen.append((state, nbytes))
        used = max(nbytes, used - DEMOTION) if used > nbytes else min(nbytes, used + PUTS)
    return seen


@pytest.mark.parametrize("reserve", [1024 * MIB, 2400 * MIB, 6000 * MIB])
def test_a_recorded_host_gets_its_reserve_and_targets_do_not_oscillate(reserve: int) -> None:
    history = recorded()
    total = history[0].total
    limits = Limits(minimum=0, maximum=total // 2, pressure=0.1)
    seen = replay(history, limits, reserve)
    budgets = [nbytes for _, nbytes in seen]
    ceilings = [min(state.used + state.spare, limits.maximum) for state, _ in seen]
    # It goes along with the host's large swings, and with no others.
    assert turns(budgets, total // 10) <= turns(ceilings, total // 10)
    assert turns(budgets, int(total * BAND)) <= 0.7 * turns(ceilings, int(total * BAND))
    assert max(budgets) == limits.maximum or reserve > 2400 * MIB
    for state, nbytes in seen:
        # Where the reserve is not kept, pools have been told already, and give it back at their speed.
        assert state.spare >= 0 or nbytes < state.used or nbytes == limits.minimum == state.used
