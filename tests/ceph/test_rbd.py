# SPDX-License-Identifier: BSD-3-Clause
"""What docs/cluster.md says of RBD: how its lock behaves when two have an image open."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.ceph.cluster import Cluster, Export
from tests.support.harness import MIB, connect

IMAGE = "locked"
PAGE = 4096


@pytest.fixture
def two(cluster: Cluster, disks: Path) -> Iterator[tuple[Export, Export]]:
    """Two servers of one image."""
    cluster.create(IMAGE, 16 * MIB)
    servers = Export(cluster, IMAGE, disks / "one"), Export(cluster, IMAGE, disks / "other")
    with contextlib.ExitStack() as undo:
        for server in servers:
            undo.callback(server.kill)
            server.start()
        yield servers


def test_the_exclusive_lock_is_a_fence_only_against_who_does_not_answer(
    cluster: Cluster, two: tuple[Export, Export]
) -> None:
    one, other = (connect(server.socket, IMAGE) for server in two)
    # Both are alive: the lock goes to and fro, and each overwrites what the other wrote.
    for turn in range(4):
        one.pwrite(b"1" * PAGE, turn * PAGE)
        holder = cluster.owner(IMAGE)
        other.pwrite(b"2" * PAGE, turn * PAGE)
        assert cluster.owner(IMAGE) not in {"", holder}
        assert one.pread(PAGE, turn * PAGE) == b"2" * PAGE
    one.pwrite(b"1" * PAGE, 0)
    holder = cluster.owner(IMAGE)
    assert holder not in cluster.blocklisted()

    # Who holds it and is hung loses it when his watch has timed out, and can never write again.
    two[0].signal(signal.SIGSTOP)
    other.pwrite(b"2" * PAGE, 0)
    assert holder in cluster.blocklisted()
    two[0].signal(signal.SIGCONT)
    with pytest.raises(nbd.Error):
        one.pwrite(b"1" * PAGE, 0)
    assert other.pread(PAGE, 0) == b"2" * PAGE

    # By hand it takes no time.
    cluster.blocklist(cluster.owner(IMAGE))
    with pytest.raises(nbd.Error):
        other.pwrite(b"2" * PAGE, 0)
