# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.series import turns
from tmemd.governor.budget import BAND, CUT, GROWTH, HOLD_MAX, HOLD_MIN, NEAR, Budget, Limits, MemoryState

MIB, GIB = 1 << 20, 1 << 30
TOTAL = 16 * GIB
BAND_BYTES = int(TOTAL * BAND)
LIMITS = Limits(minimum=256 * MIB, maximum=8 * GIB, pressure=0.1)


def moment(spare: int, used: int = 0, pressure: float = 0.0) -> MemoryState:
    return MemoryState(total=TOTAL, spare=spare, used=used, pressure=pressure)


def test_turns_are_counted() -> None:
    assert turns([0, 5, 9, 100, 200, 190, 210], 10) == 0
    assert turns([0, 100, 0, 100, 95], 10) == 2


def ticks_until(budget: Budget, now: MemoryState, wanted: int) -> int:
    for tick in range(1000):
        if budget.step(now) >= wanted:
            return tick + 1
    raise AssertionError("it never got there")


def test_an_idle_host_gives_all_in_seconds() -> None:
    budget = Budget(LIMITS, 256 * MIB)
    assert ticks_until(budget, moment(12 * GIB), 8 * GIB) <= 1 / GROWTH + 2
    assert Budget(LIMITS).step(moment(12 * GIB)) == 8 * GIB


def test_what_the_host_lacks_is_taken_back_in_one_tick() -> None:
    budget = Budget(LIMITS, 8 * GIB)
    assert budget.step(moment(-3 * GIB, used=8 * GIB)) == 5 * GIB - BAND_BYTES // 2


def test_it_is_not_asked_for_again_while_pools_are_giving_it() -> None:
    budget = Budget(LIMITS, 8 * GIB)
    first = budget.step(moment(-3 * GIB, used=8 * GIB))
    for given_back in range(0, 3 * GIB, 100 * MIB):
        assert budget.step(moment(-3 * GIB + given_back, used=8 * GIB - given_back)) == first


def test_never_below_the_minimum_nor_above_the_maximum() -> None:
    budget = Budget(LIMITS, 1 << 50)
    assert budget.step(moment(100 * GIB)) == 8 * GIB
    assert budget.step(moment(-100 * GIB)) == 256 * MIB


def test_noise_within_the_band_changes_nothing() -> None:
    budget = Budget(LIMITS)
    settled = budget.step(moment(4 * GIB))
    for tick in range(100):
        noise = (tick * 7919 % 1000 - 500) * (BAND_BYTES - MIB) // 1000
        assert budget.step(moment(4 * GIB - noise // 2, used=0)) == settled


def test_a_busy_host_s_noise_changes_nothing() -> None:
    """60 MiB, as measured on one of 24 GiB."""
    budget = Budget(LIMITS)
    spares = (4 * GIB - tick * 7919 % 60 * MIB for tick in range(1000))
    seen = {budget.step(MemoryState(total=24 * GIB, spare=spare, used=0)) for spare in spares}
    assert len(seen) <= 2


def test_after_a_shrink_growth_waits() -> None:
    budget = Budget(LIMITS, 4 * GIB)
    low = budget.step(moment(2 * GIB))
    assert [budget.step(moment(6 * GIB)) for _ in range(HOLD_MIN - 1)] == [low] * (HOLD_MIN - 1)
    assert budget.step(moment(6 * GIB)) == low + 8 * GIB * GROWTH


NEAR_BYTES = int(TOTAL * NEAR)


def test_pressure_cuts_in_proportion_and_only_once_for_what_is_owed() -> None:
    budget = Budget(LIMITS, 4 * GIB)
    assert budget.step(moment(0, used=4 * GIB, pressure=0.15)) == pytest.approx(4 * GIB * 0.95, abs=2)
    owing = budget.step(moment(0, used=4 * GIB, pressure=1.0))
    assert owing == pytest.approx(4 * GIB * 0.95, abs=2)
    assert budget.step(moment(0, used=owing, pressure=1.0)) == pytest.approx(owing * (1 - CUT), abs=2)


def test_pressure_takes_back_what_was_not_used() -> None:
    budget = Budget(LIMITS, 8 * GIB)
    assert budget.step(moment(0, used=GIB, pressure=0.5)) == GIB * (1 - CUT)


def test_pressure_takes_nothing_where_plenty_is_available() -> None:
    """A container at its own limit waits all the time, and nothing of ours would help it."""
    budget = Budget(LIMITS, 4 * GIB)
    seen = [budget.step(moment(NEAR_BYTES, used=4 * GIB, pressure=1.0)) for _ in range(100)]
    assert min(seen) >= 4 * GIB
    assert seen[-1] == 4 * GIB + NEAR_BYTES - BAND_BYTES // 2, "it does not keep what is idle from the pools, either"


def test_pressure_takes_no_more_than_leads_away_from_the_reserve() -> None:
    budget, used = Budget(LIMITS, 4 * GIB), 4 * GIB
    for _ in range(100):
        used = budget.step(moment(NEAR_BYTES - 100 * MIB + 4 * GIB - used, used=used, pressure=1.0))
    assert used >= 4 * GIB - 100 * MIB


def test_nothing_grows_near_the_reserve_until_pressure_is_gone() -> None:
    budget = Budget(LIMITS, 4 * GIB)
    near = NEAR_BYTES - MIB
    assert {budget.step(moment(near, used=4 * GIB, pressure=0.06)) for _ in range(100)} == {4 * GIB}
    assert ticks_until(budget, moment(near, used=4 * GIB, pressure=0.05), 4 * GIB + 1) == HOLD_MIN


def test_a_limit_of_all_the_time_means_no_limit() -> None:
    limits = Limits(minimum=0, maximum=8 * GIB, pressure=1.0)
    assert Budget(limits, 4 * GIB).step(moment(10 * GIB, used=GIB, pressure=1.0)) > 4 * GIB


def test_a_maximum_that_is_lowered_holds_at_once() -> None:
    budget = Budget(LIMITS, 8 * GIB)
    budget.limits = Limits(minimum=0, maximum=GIB, pressure=0.1)
    assert budget.step(moment(10 * GIB)) == GIB


def test_a_sawtooth_is_followed_ever_more_rarely() -> None:
    """A process that takes and frees 3 GiB every 20 seconds, for 20 minutes."""
    budget, seen = Budget(LIMITS), []
    for tick in range(2400):
        phase = tick % 40
        taken = 3 * GIB * min(phase, 40 - phase) // 20
        seen.append(budget.step(moment(6 * GIB - taken)))
    assert turns(seen, BAND_BYTES) <= 24  # the sawtooth itself has 120
    assert turns(seen[:240], BAND_BYTES) >= 2, "it never gave what was free"


def test_a_slow_leak_is_followed_in_steps_and_downwards_only() -> None:
    budget, seen = Budget(LIMITS), []
    for tick in range(2400):
        seen.append(budget.step(moment(6 * GIB - tick * 2 * MIB)))
        assert seen[-1] <= 6 * GIB - tick * 2 * MIB
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) <= 2400 * 2 * MIB // (BAND_BYTES // 2) + 2


def test_a_step_down_and_up() -> None:
    budget = Budget(LIMITS)
    spares = [6 * GIB] * 60 + [GIB] * 60 + [6 * GIB] * 60
    seen = [budget.step(moment(spare)) for spare in spares]
    assert turns(seen, BAND_BYTES) == 1
    assert max(seen[60:120]) <= GIB
    assert seen[60 + 60 + HOLD_MIN + round(1 / GROWTH) + 1] >= 6 * GIB - BAND_BYTES


def test_the_longest_hold_ends() -> None:
    budget = Budget(LIMITS)
    for _ in range(50):
        budget.step(moment(6 * GIB))
        budget.step(moment(2 * GIB))
        for _ in range(HOLD_MAX + 2):
            budget.step(moment(6 * GIB))
    assert ticks_until(budget, moment(6 * GIB), 6 * GIB - BAND_BYTES) < 2 * HOLD_MAX


sizes = st.integers(-64 * GIB, 64 * GIB)
moments = st.builds(
    MemoryState,
    total=st.just(TOTAL),
    spare=sizes,
    used=st.integers(0, 16 * GIB),
    pressure=st.just(0.0) | st.floats(0, 1),
)
limits = st.builds(
    lambda low, more, pressure: Limits(minimum=low, maximum=low + more, pressure=pressure),
    st.integers(0, 8 * GIB),
    st.integers(0, 8 * GIB),
    st.floats(0, 1),
)


@given(limits, st.none() | st.integers(0, 1 << 50), st.lists(moments, max_size=60))
def test_it_keeps_within_its_limits(within: Limits, start: int | None, history: list[MemoryState]) -> None:
    budget = Budget(within, start)
    before = None
    for now in history:
        nbytes = budget.step(now)
        assert within.minimum <= nbytes <= within.maximum
        ceiling = now.used + now.spare
        assert nbytes <= max(ceiling, within.minimum)
        if before is not None:
            assert nbytes - before <= within.maximum * GROWTH
        before = nbytes


better = st.tuples(st.integers(0, GIB), st.floats(0, 1))


@given(limits, st.lists(moments, max_size=20), moments, better)
def test_more_available_and_less_pressure_never_give_less(
    within: Limits, history: list[MemoryState], now: MemoryState, change: tuple[int, float]
) -> None:
    def after(last: MemoryState) -> int:
        budget = Budget(within)
        for past in history:
            budget.step(past)
        return budget.step(last)

    more, pressure = change
    eased = MemoryState(total=now.total, spare=now.spare + more, used=now.used, pressure=min(pressure, now.pressure))
    assert after(eased) >= after(now)
