# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tmemd.governor.writes import BURST, WriteAllowance, Writer, granted
from tmemd.store.poolfile import PAGE

HOUR = 3600
PER_HOUR = 3600 * PAGE  # a page a second


def writer(wants: int = 0, written: int = 0, bound: int | None = None) -> Writer:
    return Writer(written, wants, bound)


def test_no_hour_sees_more_than_is_allowed() -> None:
    """A pool that writes whatever it may, as soon as it may."""
    allowance, history, written = WriteAllowance(PER_HOUR), [], 0
    for _ in range(3 * HOUR):
        (bound,) = allowance.share([writer(1, written)])
        history.append(bound - written)
        allowance.pass_time(1, bound - written)
        written = bound
    worst = max(sum(history[first : first + HOUR]) for first in range(2 * HOUR))
    assert worst <= 3600
    assert worst >= 3500, "much less than what is allowed can be written"


def test_what_is_left_goes_to_those_who_want_it_and_half_to_all_alike() -> None:
    allowance = WriteAllowance(PER_HOUR, 800)
    assert allowance.share([writer(), writer(), writer(), writer()]) == [200] * 4
    assert allowance.share([writer(), writer(30), writer(), writer(10)]) == [100, 400, 100, 200]
    assert allowance.share([]) == []


def test_bounds_count_from_what_was_written_already() -> None:
    assert WriteAllowance(PER_HOUR, 100).share([writer(written=7000)]) == [7100]


def test_a_bound_that_would_hardly_rise_stays_but_one_that_falls_is_set() -> None:
    allowance = WriteAllowance(PER_HOUR, 160)
    assert allowance.share([writer(bound=150)]) == [150]
    assert allowance.share([writer(bound=161)]) == [160]
    assert allowance.share([writer(bound=100)]) == [160]


def test_writes_below_the_reserve_use_it_up_and_leave_no_debt() -> None:
    allowance = WriteAllowance(PER_HOUR)
    assert allowance.left_bytes == PER_HOUR * BURST
    allowance.pass_time(1, 1_000_000)
    assert allowance.left_bytes == 0
    allowance.pass_time(100, 0)
    assert allowance.left_bytes == 75 * PAGE


def test_what_was_granted_outlives_tmemd() -> None:
    writers = [writer(written=10, bound=50), writer(written=60, bound=50), writer(written=5)]
    assert granted(writers) == 40
    assert granted([writer(), writer(written=5)]) is None
    assert WriteAllowance(PER_HOUR, granted(writers)).left_bytes == 40 * PAGE
    assert WriteAllowance(PER_HOUR, 1e9).left_bytes == PER_HOUR * BURST


writers = st.lists(
    st.builds(Writer, st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40)),
    max_size=20,
)


@given(st.floats(0, 1e6), writers)
def test_together_never_more_than_is_left(left: float, those: list[Writer]) -> None:
    allowance = WriteAllowance(1 << 50, left)
    given_out = sum(max(bound - each.written, 0) for each, bound in zip(those, allowance.share(those), strict=True))
    assert given_out <= left
