# SPDX-License-Identifier: BSD-3-Clause
"""FLUSH, SIGKILL, host death, failed syncs and torn writes in any order: a page is its newest content, or EIO.

Set HISTORIES to try more of them, as in `HISTORIES=1000 pytest tests/crash/test_host_death.py`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.history import faults, history
from tests.crash.truth import Kind
from tests.crash.world import World

TOGETHER = 5  # histories: together they have seen everything
BATCHES = -(-int(os.environ.get("HISTORIES", "40")) // (4 * TOGETHER))
STEPS = 60  # of each boot
BOOTS = 2
CREATION = 12  # operations: a device that could not be created is none


def live_and_die(world: World, seed: int, *, failures: bool) -> None:
    """Several boots of a host, several lives of a device in each, any of which may be killed anywhere."""
    for boot in range(BOOTS):
        steps = history(seed * BOOTS + boot, STEPS)
        first = 0 if boot else CREATION
        while steps:
            plan = faults(world.rng, failures=failures, first=first)
            steps = world.live(steps, plan, look=world.rng.random() < 0.5)
            if world.rng.random() < 0.5:
                world.evict()
            first = 0
        world.live([], look=True)
        world.host_dies()
    world.live([])


@pytest.mark.slow
@pytest.mark.parametrize("failures", [False, True], ids=["kills", "failures"])
@pytest.mark.parametrize("durable", [False, True], ids=["write-back", "durable"])
@pytest.mark.parametrize("batch", range(BATCHES))
def test_invariant_6_every_prefix_with_any_unsynced_writes_missing(
    pools: Path, batch: int, durable: bool, failures: bool
) -> None:
    alive: Counter[Kind] = Counter()
    dead: Counter[Kind] = Counter()
    ends: Counter[int] = Counter()
    failed = 0
    for seed in range(batch * TOGETHER, (batch + 1) * TOGETHER):
        print("seed", seed)
        base = pools / str(seed)
        base.mkdir()
        # Requests of every second batch come by the virtio door; every second map is in the tail of the file.
        world = World(
            base, seed, durable=durable, lost_zero=seed % 2 == 1, vhost=batch % 2 == 1, inside=seed // 2 % 2 == 1
        )
        live_and_die(world, seed, failures=failures)
        alive += world.truth.seen
        dead += world.found
        ends += world.ends
        failed += sum(times for (_, acknowledged), times in world.truth.steps.items() if not acknowledged)
    assert min(alive[Kind.NEWEST], dead[Kind.NEWEST]) > 1000
    assert dead[Kind.UNFLUSHED if durable else Kind.LOST] > 1000
    assert dead[Kind.TORN]
    assert ends[-signal.SIGKILL]
    assert failed or not failures


@pytest.mark.slow
def test_a_tail_whose_making_was_killed_anywhere_is_made_again(pools: Path) -> None:
    ends: Counter[int] = Counter()
    for number in range(3, 17):  # of what is done to the file until it is served
        base = pools / str(number)
        base.mkdir()
        world = World(base, number, inside=True)
        world.live([], f"{number}a")
        if number % 2:
            world.host_dies()
        world.live(history(number, 4))
        ends += world.ends
    assert ends == {-signal.SIGKILL: 14, 0: 14}
