# SPDX-License-Identifier: BSD-3-Clause
"""Three devices under contention: RAM follows weights, caps and minimums hold, and what nobody needs changes hands."""

from __future__ import annotations

import pytest

from tests.support import contention
from tests.support.harness import MIB

pytestmark = pytest.mark.slow


def test_ram_follows_weights_and_changes_hands() -> None:
    result = contention.measure()
    print(contention.render(result))
    assert all(abs(off) <= contention.NEAR for off in result["settled"]["off_weights"].values())
    assert max(result["settled"]["above_target"].values()) <= 0
    assert result["wrong_pages"] == 0


def test_caps_and_minimums_hold_at_every_sample() -> None:
    caps, minimums = {"heavy": 16 * MIB, "middle": 20 * MIB}, {"light": 24 * MIB, "heavy": 8 * MIB}
    result = contention.measure(caps, minimums)
    print(contention.render(result))
    assert result["violations"] == []
    assert result["wrong_pages"] == 0
    # Nobody else may have what is left of the budget.
    assert result["target"]["light"] >= (contention.BUDGET - sum(caps.values())) * (1 - contention.NEAR)
