# SPDX-License-Identifier: BSD-3-Clause
"""A guest with two swap areas: ours is taken first while its priority is the higher, and the other when it is full."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import uml
from tests.support.harness import MIB, Serve, counters, device
from tests.support.verdict import guest_faults, second_chance

OURS, OTHER = 16 * MIB, 256 * MIB
MEMORY, HOG = "96M", "80"  # the guest's, and how many MiB its program fills
HIGHER, LOWER = 200, 50  # than ours, which attach gives
SECONDS = 300  # a guard against a hang

pytestmark = [pytest.mark.vm, pytest.mark.timeout(700), *uml.needs_uml]


def test_the_kernel_fills_the_area_of_the_highest_priority(serve: Serve, pools: Path, disks: Path) -> None:
    uml.make("build/hog", "build/ptrace.so")
    server = serve(device("swap", pools, OURS, disks / "backing", OURS), door="vhost")
    with (disks / "other").open("wb") as other:
        other.truncate(OTHER)
    disk = f"virtio_uml.device={server.vhost}:2 ubdb={disks / 'other'}"
    workload = "tests/vm/areas/workload", "build/hog", HOG, f"{HIGHER},{LOWER}"  # ours has nothing at first

    def run() -> dict[int, list[int]]:
        said, status = uml.swap_on(disks, disk, MEMORY, *workload, seconds=SECONDS)
        print(said)
        assert guest_faults(said, status, idle=True) == []
        found = re.findall(r"areas: other of (\d+): (\d+) of (\d+) KiB of ours, (\d+) of the other", said)
        return {int(priority): [int(each) for each in kib] for priority, *kib in found}

    areas = second_chance(run)
    used, _, elsewhere = areas[HIGHER]
    assert (used, elsewhere > 0) == (0, True)
    used, size, elsewhere = areas[LOWER]
    assert (used > 0.95 * size, elsewhere > 0) == (True, True)
    assert counters(pools / "swap.pool").io_errors == 0
