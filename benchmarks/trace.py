# SPDX-License-Identifier: BSD-3-Clause
"""Overwrites that every candidate gets in the same order."""

from __future__ import annotations

import array
import random
from pathlib import Path

Trace = list[tuple[int, int]]
"""Pairs: the page written, and the page of the corpus that is its content."""


def make(pages: int, rounds: int) -> Trace:
    """Each page overwritten once a round, in random order, with a random page of the corpus."""
    rng = random.Random(1)
    order = list(range(pages))
    trace: Trace = []
    for _ in range(rounds):
        rng.shuffle(order)
        trace += [(page, rng.randrange(pages)) for page in order]
    return trace


def save(trace: Trace, path: Path) -> None:
    """Write a trace as the C programs read it: two unsigned 32-bit words for each write."""
    path.write_bytes(array.array("I", [number for write in trace for number in write]).tobytes())
