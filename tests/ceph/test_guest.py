# SPDX-License-Identifier: BSD-3-Clause
"""A real guest swaps on a device as docs/cluster.md makes it, on an RBD image, while what is below it dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ceph.cluster import Cluster, Export
from tests.support import uml
from tests.support.content import PAGE
from tests.support.contention import Sampler
from tests.support.harness import MIB, Serve, Server, counters, device, wait_until
from tests.support.kills import kill_until
from tests.support.verdict import guest_faults, is_idle, second_chance

IMAGE = "guest"
SIZE = 512 * MIB
LIMIT = 24 * MIB  # a quarter of what the guest swaps, once compressed
MEMORY, HOG = "96M", 256  # the guest's, and how many MiB its program fills
WORKLOAD = "tests/vm/workload", "build/hog", str(HOG)
KILLS = 4  # at least
SECONDS = 400  # a guard against a hang

pytestmark = [pytest.mark.timeout(1200), *uml.needs_uml]


@dataclass
class Store:
    """What the device of a *guest* stands on: the OSD, and every other time its server as well."""

    cluster: Cluster
    export: Export
    server: Server
    guest: Future[tuple[str, int]]
    kills: int = 0

    def kill(self) -> None:
        """Kill, and wait until a page of the guest's waits for it; the tail is behind these."""
        self.cluster.kill("osd.0")
        wait_until(
            lambda: self.guest.done() or any(at < SIZE for at in self.export.waiting()), "requests to wait for the OSD"
        )
        self.kills += 1
        if self.kills % 2 == 0:
            self.server.kill()

    def start(self) -> None:
        """Start it again; the server waits for the OSD then, and the guest for both."""
        self.cluster.start("osd.0")
        if not self.server.alive():
            self.server.start()


@pytest.fixture
def export(cluster: Cluster, disks: Path) -> Iterator[Export]:
    """An image for the device and its tail, served."""
    with contextlib.ExitStack() as undo:
        cluster.create(IMAGE, SIZE + MIB)
        undo.callback(cluster.remove, IMAGE)
        served = Export(cluster, IMAGE, disks / "rbd.sock")
        undo.callback(served.kill)
        yield served.start()


def swap(cluster: Cluster, export: Export, server: Server, pool: Path, directory: Path) -> None:
    """Have a guest swap, and judge it. HarnessError when there is no telling."""
    sampler = Sampler({IMAGE: pool}, interval=0.2)
    with uml.disk(directory, server.socket, IMAGE) as disk, ThreadPoolExecutor() as threads, sampler.running():
        guest = threads.submit(uml.swap_on, directory, disk, MEMORY, *WORKLOAD, seconds=SECONDS)
        kills = kill_until(guest.done, Store(cluster, export, server, guest), pool, range(1500, 4000))
        said, status = guest.result()
    print(f"{said}\n{kills} kills")
    idle = is_idle((sample.at, sample.requests[IMAGE]) for sample in sampler.samples)
    assert guest_faults(said, status, idle=idle) == []
    assert kills >= KILLS


def test_a_guest_goes_on_when_the_osd_is_killed(
    cluster: Cluster, export: Export, serve: Serve, pools: Path, disks: Path
) -> None:
    uml.make("build/hog", "build/ptrace.so")
    server, pool = serve(device(IMAGE, pools, SIZE, export.uri, LIMIT, timeout=60)), pools / f"{IMAGE}.pool"
    try:
        second_chance(lambda: swap(cluster, export, server, pool, disks))
    finally:
        server.kill()  # the image cannot be removed while it is open
    now = counters(pool)
    assert (now.bad_checksums, now.io_errors, now.pages_lost) == (0, 0, 0)  # of a guest that panicked as well
    assert now.file_reads > HOG * MIB // PAGE / 2
