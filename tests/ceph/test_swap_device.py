# SPDX-License-Identifier: BSD-3-Clause
"""A swap device whose backing is an RBD image, as whatever is behind it dies and comes back under load."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ceph.cluster import Cluster, Export
from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, counters, device
from tests.support.index import Kind, kinds
from tests.support.writers import Ledger, Writers

PAGES = 8192
OURS = range(7000, 7064)  # which no writer writes to; the device's last ones are written through
WRITTEN = OURS.start
TARGET = 6 * MIB  # a third of what the writers' pages take
REQUESTS = 400  # of the writers, between two events
TIMEOUT = 120  # seconds; an OSD that was killed takes ten to be back
IMAGE = "swap"


@dataclass
class Device:
    """A device, and what is behind it."""

    cluster: Cluster
    export: Export
    server: Server
    pool: Path
    ledger: Ledger

    def writers(self, seed: int = 1) -> Writers:
        """Have clients write."""
        return Writers(self.ledger, seed, self.server.connect)

    def verify(self) -> None:
        """All pages are what they must be."""
        with self.server.client() as client:
            self.ledger.verify(client)
        now = counters(self.pool)
        assert (now.bad_checksums, now.io_errors) == (0, 0)

    def pages_in_ram(self) -> list[int]:
        """Those of the writers' that need no file."""
        return [page for page, kind in enumerate(kinds(self.pool)[:WRITTEN]) if kind is Kind.TMEM]


@pytest.fixture
def swap(cluster: Cluster, serve: Serve, pools: Path, disks: Path) -> Iterator[Device]:
    """A device that swaps to RBD, in its default mode."""
    with contextlib.ExitStack() as undo:
        cluster.create(IMAGE, PAGES * PAGE)
        undo.callback(cluster.remove, IMAGE)
        export = Export(cluster, IMAGE, disks / "rbd.sock")
        undo.callback(export.kill)
        keys = {"bitmap": disks / "map", "timeout": TIMEOUT}
        server = serve(device("swap", pools, PAGES * PAGE, export.start().uri, TARGET + MIB, **keys))
        undo.callback(server.kill)
        with Control(pools / "swap.pool") as control:
            control.target(TARGET)
        yield Device(cluster, export, server, pools / "swap.pool", Ledger(WRITTEN))


def reads_and_writes_in_ram(swap: Device) -> None:
    """Returns although nothing can be read from the backing, or written to it."""
    with swap.server.client() as client, Control(swap.pool) as control:
        for page in random.Random(1).sample(swap.pages_in_ram(), 200):
            allowed = [content(page, version) for version in swap.ledger.allowed(page)]
            assert client.pread(PAGE, page * PAGE) in allowed
        control.target(TARGET + MIB)
        for page in OURS:
            client.pwrite(content(page, 1), page * PAGE)
            assert client.pread(PAGE, page * PAGE) == content(page, 1)
        control.target(TARGET)


def test_nothing_is_lost_when_the_osd_is_killed_under_load(swap: Device) -> None:
    writers = swap.writers()
    for _ in range(3):
        swap.ledger.wait_for(REQUESTS, writers.stop)
        swap.cluster.kill("osd.0")
        reads_and_writes_in_ram(swap)
        swap.cluster.start("osd.0")
    swap.ledger.wait_for(REQUESTS, writers.stop)
    writers.finish()
    swap.verify()


def test_the_monitor_may_be_away(swap: Device) -> None:
    writers = swap.writers()
    swap.ledger.wait_for(REQUESTS, writers.stop)
    swap.cluster.kill("mon.a")
    swap.ledger.wait_for(REQUESTS, writers.stop)
    swap.cluster.start("mon.a")
    swap.ledger.wait_for(REQUESTS, writers.stop)
    writers.finish()
    swap.verify()


def test_nothing_is_lost_when_qemu_nbd_is_killed_under_load(swap: Device) -> None:
    writers = swap.writers()
    for _ in range(2):  # each time the image's lock is the dead one's until his watch has timed out
        swap.ledger.wait_for(REQUESTS, writers.stop)
        swap.export.kill()
        reads_and_writes_in_ram(swap)
        swap.export.start()
    swap.ledger.wait_for(REQUESTS, writers.stop)
    writers.finish()
    swap.verify()


def test_the_plugin_is_killed_while_it_waits_for_the_osd(swap: Device) -> None:
    for seed in range(2):
        writers = swap.writers(seed)
        swap.ledger.wait_for(REQUESTS, writers.stop)
        swap.cluster.kill("osd.0")
        reads_and_writes_in_ram(swap)
        swap.server.kill()
        writers.join()
        swap.cluster.start("osd.0")
        swap.server.start()
        swap.verify()
