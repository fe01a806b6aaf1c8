# SPDX-License-Identifier: BSD-3-Clause
"""What a series of figures does."""

from __future__ import annotations

from collections.abc import Sequence


def turns(values: Sequence[int], band: int) -> int:
    """How often the direction changes, moves within the band not counted."""
    count, direction, turning = 0, 0, values[0]
    for value in values:
        if abs(value - turning) > band:
            now = 1 if value > turning else -1
            count += now != direction != 0
            direction = now
        if direction * (value - turning) > 0 or abs(value - turning) > band:
            turning = value
    return count
