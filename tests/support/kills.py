# SPDX-License-Identifier: BSD-3-Clause
"""Servers that are killed and started again while a guest works."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from tests.support.harness import counters, wait_until


class Mortal(Protocol):
    """What is killed and started again: a server, or what stands behind it."""

    def kill(self) -> None: ...
    def start(self) -> object: ...


def requests(pool: Path) -> int:
    """How many reads and writes were asked for since the pool was made."""
    now = counters(pool)
    return now.reads + now.writes


def kill_until(ended: Callable[[], bool], server: Mortal, pool: Path, between: range) -> int:
    """Kill the server and start it again, each time after a number of requests from *between*; returns how often."""
    rng, kills = random.Random(1), 0

    def has_come_to(goal: int) -> bool:
        return ended() or requests(pool) >= goal

    while not ended():
        wait_until(partial(has_come_to, requests(pool) + rng.choice(between)), "the guest to go on")
        server.kill()
        server.start()
        kills += 1
    return kills
