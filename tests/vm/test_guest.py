"""A real guest with less RAM than its workload swaps on our device, and every page comes back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run"
SKIPPED, BROKE = 77, 99

pytestmark = [pytest.mark.vm, pytest.mark.timeout(660)]


@pytest.mark.parametrize("attach", ["virtio", "nbd"])
def test_guest_swaps(attach: str) -> None:
    """Through both ways a guest can have the device; RUN's output says what was seen."""
    done = subprocess.run(
        [RUN, attach], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    print(done.stdout)
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == SKIPPED:
        pytest.skip(last)
    if done.returncode == BROKE:
        raise RuntimeError(last)
    assert done.returncode == 0, last
