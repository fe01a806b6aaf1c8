# SPDX-License-Identifier: BSD-3-Clause
"""Weighted max-min fair shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Fractions with denominators below 2^64 differ by more than 2^-128 if at all: rounded to that, they keep their order.
_KEY_BITS: Final = 128
_STARTS, _STOPS = range(2)


def share(budget: int, weights: Sequence[int], floors: Sequence[int], ceilings: Sequence[int]) -> list[int]:
    """Divide *budget* by weight, everybody between a floor and a ceiling: clamp(L * weight, floor, ceiling) for one L.

    What one may not take goes to the others by their weights ('water filling'; Bertsekas and Gallager, Data Networks,
    6.5.2). Weights are from 1 to 2^64 - 1. Returns whole numbers whose sum is at most *budget*, unless the floors alone
    are more; less than one for each party is left over while somebody wants it. O(n log n).
    """
    numerator, denominator = _level(budget, weights, floors, ceilings)
    return [
        min(max(numerator * weight // denominator, floor), max(floor, ceiling))
        for weight, floor, ceiling in zip(weights, floors, ceilings, strict=True)
    ]


def _level(budget: int, weights: Sequence[int], floors: Sequence[int], ceilings: Sequence[int]) -> tuple[int, int]:
    """L as a fraction: raised, past the points where one leaves its floor or meets its ceiling, until all is given."""
    points = []
    for weight, floor, ceiling in zip(weights, floors, ceilings, strict=True):
        if floor < ceiling:
            points.append(((floor << _KEY_BITS) // weight, _STARTS, floor, weight))
            points.append(((ceiling << _KEY_BITS) // weight, _STOPS, ceiling, weight))
    points.sort()
    fixed, moving = sum(floors), 0  # what those get whose share does not depend on L, and the weights of the others
    if fixed >= budget:
        return 0, 1
    value, weight = 0, 1
    for _, kind, value, weight in points:
        if fixed * weight + moving * value >= budget * weight:
            return budget - fixed, moving
        moving += weight if kind == _STARTS else -weight
        fixed += -value if kind == _STARTS else value
    return value, weight
