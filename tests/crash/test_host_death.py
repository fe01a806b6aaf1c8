"""FLUSH, SIGKILL, host death, failed syncs and torn writes in any order: a page is its newest content, or says it is lost.

Set HISTORIES to try more of them than these few, as in `HISTORIES=1000 pytest tests/crash/test_host_death.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.crash.history import faults, history
from tests.crash.truth import Kind
from tests.crash.world import World

HISTORIES = int(os.environ.get("HISTORIES", "12"))
STEPS = 60  # of each boot
BOOTS = 2
CREATION = 12  # operations: a device that could not be created is none


def live_and_die(world: World, seed: int, *, failures: bool) -> None:
    """Several boots of a host, several lives of a device in each, any of which may be killed anywhere."""
    for boot in range(BOOTS):
        steps = history(seed * BOOTS + boot, STEPS)
        first = CREATION if not boot else 0
        while steps:
            plan = faults(world.rng, failures=failures, first=first)
            steps = world.live(steps, plan, look=world.rng.random() < 0.5)
            if world.rng.random() < 0.5:
                world.evict()
            first = 0
        world.live([], look=True)
        world.host_dies()
    world.live([])


@pytest.mark.parametrize("failures", [False, True], ids=["kills", "failures"])
@pytest.mark.parametrize("durable", [False, True], ids=["write-back", "durable"])
@pytest.mark.parametrize("seed", range(HISTORIES // 4))
def test_invariant_6_every_prefix_with_any_unsynced_writes_missing(
    pools: Path, seed: int, durable: bool, failures: bool
) -> None:
    world = World(pools, seed, durable=durable, lost_zero=seed % 2 == 1)
    live_and_die(world, seed, failures=failures)
    assert world.found[Kind.NEWEST] > 100
    assert world.found[Kind.UNFLUSHED if durable else Kind.LOST] > 100
