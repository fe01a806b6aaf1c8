# SPDX-License-Identifier: BSD-3-Clause
"""A device on an NBD server of which something is killed, missing or away at a bad moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.harness import MIB
from tests.support.remotes import Remote
from tests.support.saving import STEPS, killed_at, read
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig, Uri
from tmemd.device.remote import RemoteStore
from tmemd.device.serve import open_device

SIZE = 4 * MIB


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, SIZE + MIB)
    with Remote(tmp_path, ["file", str(disk)]) as server:
        yield server.start()


def empty(remote: Remote, pools: Path) -> None:
    """Have nothing of the device, here or there."""
    for path in [*pools.glob("*"), *remote.run.glob("map*")]:
        path.unlink()
    for size in 0, SIZE + MIB:
        os.truncate(remote.run / "disk", size)


def begin(config: DeviceConfig) -> None:
    """Start it, and end in order."""
    with closing(open_device(config)):
        pass


@pytest.mark.parametrize("bitmap", ["map", pytest.param("inside", marks=pytest.mark.slow)])
def test_a_new_device_that_was_killed_while_it_was_made_has_lost_nothing(
    remote: Remote, pools: Path, bitmap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.saving.STEPS", [*STEPS, (RemoteStore, "write")])
    file, lease = (remote.run / "map", None) if bitmap == "map" else (None, 1.0)
    config = DeviceConfig("far", SIZE, Uri(remote.uri), _core.layout(SIZE).minimum_bytes + MIB, pools, bitmap=file,
                          durable=True, timeout=0.5, lease=lease)  # fmt: skip
    for step in range(1000):
        empty(remote, pools)
        killed = killed_at(step, lambda: begin(config))
        with closing(open_device(config)) as served:
            assert read(served.core, 0, SIZE) == bytes(SIZE)
            _core.pwrite(served.core, b"x" * 4096, 0, 0)
        if not killed:
            break
    assert step > 15
    (pools / "far.pool").unlink()  # the host dies: it is no new device any more
    with closing(open_device(config)) as served:
        assert read(served.core, 0, 4096) == b"x" * 4096
