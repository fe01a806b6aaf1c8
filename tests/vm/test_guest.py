# SPDX-License-Identifier: BSD-3-Clause
"""A real guest with less RAM than its workload swaps on our device, and every page comes back."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.documents import commands_of, recipe_of
from tests.support.harness import ROOT
from tests.support.verdict import HarnessError, second_chance

RUN = Path(__file__).parent / "run"
SKIPPED, BROKE = 77, 99

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


def demonstration() -> list[str | Path]:
    """What the README's command for it does in the end: make itself would hide the exit status."""
    _install_make, command = commands_of("README.md", "Try it")[0]
    return [*recipe_of(command)]


def run(command: list[str | Path]) -> tuple[int, str]:
    """The exit status of RUN, and its last line, which says why; all that it said is printed."""
    # It cleans up when it is told to end, and so it is when we die.
    whole = ["setpriv", "--pdeathsig", "TERM", *command]
    done = subprocess.run(
        whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    print(done.stdout)
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == BROKE:
        raise HarnessError(last)
    return done.returncode, last


@pytest.mark.parametrize("command", [demonstration, lambda: [RUN, "nbd"]], ids=["virtio", "nbd"])
def test_guest_swaps(command: Callable[[], list[str | Path]]) -> None:
    """Through both ways a guest can have the device; the first is the demonstration."""
    status, last = second_chance(lambda: run(command()))
    if status == SKIPPED:
        pytest.skip(last)
    assert status == 0, last
