# SPDX-License-Identifier: BSD-3-Clause
"""Policies tick by tick on modelled devices whose guests use their pages evenly."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.support.harness import MIB
from tmemd.governor.governor import TICK, limit_raises
from tmemd.policy import Demand, by_name
from tmemd.policy.demand import HOT, Use
from tmemd.simulation.storemodel import Flow, Space, Store
from tmemd.store.poolfile import GENERATIONS

PAGE = 1500
BUDGET = 100 * MIB
TICKS_PER_GENERATION = 10


@dataclass
class Guest:
    """Has so many pages, reads so many a second, any as likely as any other, and writes a third of these again."""

    name: str
    pages: int
    rate: float
    weight: int = 100
    minimum: int = 0
    cap: int = 1 << 40
    target: int = 0
    store: Store = field(default_factory=Store)
    told: tuple[int, int, int] = (0, 0, 0)  # puts, refused puts and file reads of the last tick
    use: Use = field(default_factory=Use)

    @property
    def used(self) -> int:
        return int(self.store.in_ram * PAGE)

    def act(self) -> None:
        by_age = [sum(row[age] for row in self.store.pages) for age in range(GENERATIONS)]
        missing = self.pages - sum(by_age)
        parts = [self.rate * TICK * n / max(1.0, self.pages) for n in by_age]
        puts = min(max(0.0, missing), self.rate * TICK) + sum(parts) / 3
        last, warm = self.use, sum(by_age[HOT:]) * PAGE
        self.use = Use(
            puts=last.puts + puts, reads=last.reads + sum(parts),
            warm_reads=last.warm_reads + sum(parts[HOT:]), warm_bytes=last.warm_bytes + warm,
        )  # fmt: skip
        space = Space(self.target, 0, PAGE)
        for _ in range(5):
            self.store.apply(Flow(puts / 5, [n / 15 for n in parts], [n / 5 for n in parts]), space)
            self.store.maintain(space, TICK / 5)

    def demand(self) -> Demand:
        counts, last = self.store.counts, self.told
        puts, refused, reads = self.told = int(counts.puts), int(counts.spills), int(counts.file_reads)
        everywhere = [int(sum(row[age] for row in self.store.pages) * PAGE) for age in range(GENERATIONS)]
        return Demand(
            name=self.name, has_file=True, weight=self.weight, minimum=self.minimum, cap=self.cap, used=self.used,
            target=self.target, overhead=0, page_bytes=PAGE, heat=tuple(everywhere),
            put=puts, use=self.use,
            puts=puts - last[0], refused=refused - last[1], file_reads=reads - last[2],
        )  # fmt: skip


class Host:
    """Guests under a policy."""

    def __init__(self, *guests: Guest, policy: str = "fair") -> None:
        self.guests = guests
        self.policy = by_name(policy)
        self.ticks = 0

    def run(self, seconds: float) -> list[tuple[int, ...]]:
        """Returns the targets of every tick."""
        return [self.tick() for _ in range(int(seconds / TICK))]

    def tick(self) -> tuple[int, ...]:
        demands = [guest.demand() for guest in self.guests]
        targets = self.policy(demands, BUDGET)
        owed = sum(max(0, each.used - targets[each.name]) for each in demands)
        targets = limit_raises(demands, targets, owed)
        assert sum(targets.values()) <= BUDGET
        for guest in self.guests:
            guest.target = targets[guest.name]
            assert guest.minimum <= guest.target <= guest.cap
            guest.act()
            if self.ticks % TICKS_PER_GENERATION == 0:
                guest.store.age()
        self.ticks += 1
        return tuple(guest.target for guest in self.guests)


@pytest.mark.parametrize("rate", [500, 2000, 8000])
def test_ram_follows_weights_where_all_want_more(rate: float) -> None:
    guests = [Guest(str(weight), 200_000, rate, weight=weight) for weight in (100, 200, 400)]
    Host(*guests).run(200)
    for guest in guests:
        assert guest.target / BUDGET == pytest.approx(guest.weight / 700, rel=0.05)
        assert guest.used / BUDGET == pytest.approx(guest.weight / 700, rel=0.1)


def test_caps_and_minimums_hold_and_the_rest_follows_weights() -> None:
    capped, kept = Guest("capped", 200_000, 2000, weight=400, cap=10 * MIB), Guest("kept", 0, 0, minimum=30 * MIB)
    one, two = Guest("one", 200_000, 2000), Guest("two", 200_000, 2000, weight=200)
    Host(capped, kept, one, two).run(120)
    assert capped.target == 10 * MIB
    assert kept.target == 30 * MIB
    assert (one.target, two.target) == pytest.approx((20 * MIB, 40 * MIB), rel=0.05)


def test_targets_settle_while_demand_is_steady() -> None:
    guests = [Guest("a", 60_000, 2000), Guest("b", 20_000, 1000), Guest("c", 200_000, 500, weight=300)]
    host = Host(*guests)
    host.run(120)
    for targets in zip(*host.run(60), strict=True):
        # The hottest tier is of 10 seconds at the beginning of a generation and of 15 at its end.
        assert max(targets) - min(targets) <= BUDGET * 0.15


def test_what_one_does_not_use_goes_to_the_others_and_comes_back_in_two_seconds() -> None:
    busy, sleeper = Guest("busy", 60_000, 4000), Guest("sleeper", 0, 0)
    host = Host(busy, sleeper)
    host.run(60)
    assert busy.used > 80 * MIB
    sleeper.pages, sleeper.rate = 20_000, 4000
    host.run(2)
    refused = sleeper.store.counts.spills
    host.run(2)
    assert sleeper.store.counts.spills - refused < 100
    host.run(20)
    assert sleeper.used > 25 * MIB
    sleeper.store, sleeper.pages, sleeper.rate, sleeper.told = Store(), 0, 0, (0, 0, 0)  # it ends, and all is freed
    host.run(2)
    assert busy.target > busy.used + 4 * MIB
    host.run(30)
    assert busy.used > 80 * MIB
