# SPDX-License-Identifier: BSD-3-Clause
"""The core against the reference: hypothesis makes up the histories, and looks for the shortest wrong one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import Machine


class RamOnly(Machine):
    """Without a backing file a refused put is an error, and nothing else changes."""

    backing = False


class Durable(Machine):
    """FLUSH copies to the file."""

    durable = True


@pytest.mark.parametrize("machine", [Machine, RamOnly, Durable])
def test_a_device_is_what_the_reference_is(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
