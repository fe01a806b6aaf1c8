# SPDX-License-Identifier: BSD-3-Clause
"""A real guest with less RAM than its workload swaps on our device, and every page comes back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.verdict import HarnessError, second_chance

RUN = Path(__file__).parent / "run"
SKIPPED, BROKE = 77, 99

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


def run(attach: str) -> tuple[int, str]:
    """RUN's exit status and its last line, which says why; all that it said is printed."""
    # It cleans up when it is told to end, and so it is when we die.
    command = ["setpriv", "--pdeathsig", "TERM", str(RUN), attach]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    print(done.stdout)
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == BROKE:
        raise HarnessError(last)
    return done.returncode, last


@pytest.mark.parametrize("attach", ["virtio", "nbd"])
def test_guest_swaps(attach: str) -> None:
    """Through both ways a guest can have the device."""
    status, last = second_chance(lambda: run(attach))
    if status == SKIPPED:
        pytest.skip(last)
    assert status == 0, last
