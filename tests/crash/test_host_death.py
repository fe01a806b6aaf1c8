# SPDX-License-Identifier: BSD-3-Clause
"""FLUSH, SIGKILL, host death, failed syncs and torn writes in any order: a page is its newest content, or EIO.

The file is a local one, or a server on another host has it, which is killed, hangs, fails, forgets, and does late what
a killed process had asked for. The disk is full for a while; a device is closed and opened again amid requests.
Set HISTORIES to try more of each kind, as in `HISTORIES=300 pytest -n auto tests/crash/test_host_death.py`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.history import faults, history
from tests.crash.setting import Setting
from tests.crash.truth import Kind
from tests.crash.world import World

TOGETHER = 4  # histories: together they have seen everything
BATCHES = -(-int(os.environ.get("HISTORIES", "4")) // TOGETHER)
STEPS = 60  # of each boot
BOOTS = 2
CREATION = 12  # operations: a device that could not be created is none
MOST_LIVES = 20  # of a boot, until nothing goes wrong any more
KINDS = {
    "write-back": Setting(), "durable": Setting(durable=True), "cache": Setting(source=True),
    "far": Setting(far=True), "far-durable": Setting(far=True, durable=True),
    "far-cache": Setting(far=True, source=True),
    "overflow": Setting(far=True, overflow=True), "overflow-durable": Setting(far=True, overflow=True, durable=True),
}  # fmt: skip


def setting_of(kind: str, seed: int) -> Setting:
    """Half of the histories have each of these."""
    setting = replace(KINDS[kind], vhost=(seed + 1) // 2 % 2 == 1, fua=seed % 3 != 0)
    if setting.source:
        return setting
    return replace(setting, lost_zero=seed % 2 == 1, inside=seed // 2 % 2 == 1 and not setting.overflow)


def live_and_die(world: World, seed: int) -> None:
    """Several boots of a host, several lives of a device in each, any of which may be killed anywhere."""
    far = world.setting.far
    if far or world.setting.source:
        world.live([])  # of a disk that was there before, only a start that came through makes a device
    for boot in range(BOOTS):
        steps = history(seed * BOOTS + boot, STEPS, far=far, vhost=world.setting.vhost)
        first = 0 if boot else CREATION
        for life in range(2 * MOST_LIVES):
            plan = faults(world.rng, failures=world.failures, first=first, far=far) if life < MOST_LIVES else ""
            if far and world.truth.must_look:
                world.live([], plan)
            steps = world.live(steps, plan, look=world.rng.random() < 0.5)
            if world.rng.random() < 0.5:
                world.evict()
            first = 0
            if not steps:
                break
        world.live([], look=True)
        world.host_dies()
    world.live([])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_invariant_6_every_prefix_with_any_unsynced_writes_missing(pools: Path, batch: int, kind: str) -> None:
    alive: Counter[Kind] = Counter()
    dead: Counter[Kind] = Counter()
    ends: Counter[int] = Counter()
    failed = 0
    for seed in range(batch * TOGETHER, (batch + 1) * TOGETHER):
        print("seed", seed)
        base = pools / str(seed)
        base.mkdir()
        setting = setting_of(kind, seed)
        with World(base, seed, setting, samples=0.3 if setting.far else 1) as world:
            world.failures = seed // 2 % 2 == 0
            live_and_die(world, seed)
        alive += world.truth.seen
        dead += world.found
        ends += world.ends
        failed += sum(times for (_, acknowledged), times in world.truth.steps.items() if not acknowledged)
    assert min(alive[Kind.NEWEST], dead[Kind.NEWEST]) > 800
    if not setting.far and not setting.source:
        assert dead[Kind.UNFLUSHED if setting.durable else Kind.LOST] > 100
    assert ends[-signal.SIGKILL]
    assert failed or setting.far  # a server is asked again, and an overflow file takes what it does not


@pytest.mark.slow
def test_a_tail_whose_making_was_killed_anywhere_is_made_again(pools: Path) -> None:
    ends: Counter[int] = Counter()
    for number in range(3, 17):  # of what is done to the file until it is served
        base = pools / str(number)
        base.mkdir()
        world = World(base, number, Setting(inside=True))
        world.live([], f"{number}a")
        if number % 2:
            world.host_dies()
        world.live(history(number, 4))
        ends += world.ends
    assert ends == {-signal.SIGKILL: 14, 0: 14}
