# SPDX-License-Identifier: BSD-3-Clause
"""A device on an NBD server of which something is killed, missing or away at a bad moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import nbd
import pytest

from tests.support.content import incompressible
from tests.support.harness import MIB, Serve, device, wait_until
from tests.support.remotes import Remote, volatile
from tests.support.saving import STEPS, killed_at, read
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig, Uri
from tmemd.device.remote import RemoteStore
from tmemd.device.serve import open_device
from tmemd.store import poolfile

SIZE = 4 * MIB
AT = 2 * MIB  # a page that is written through by durable devices alone


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


def losses(pool: Path) -> int:
    """Of connections to the server."""
    with pool.open("rb") as file:
        return poolfile.Snapshot().take(file.fileno(), pool).remote().losses


def write_in_vain(client: nbd.NBD, content: bytes) -> None:
    with pytest.raises(nbd.Error):
        client.pwrite(content, AT)


def test_who_was_stopped_sends_nothing_to_what_is_another_hosts_by_then(
    serve: Serve, pools: Path, tmp_path: Path
) -> None:
    """A write that could not be sent again before it was stopped is not sent afterwards."""
    with volatile(tmp_path / "remote", SIZE + MIB) as remote:
        remote.start()
        keys = {"timeout": 2, "lease": 4, "flush": "durable"}
        one, two = (device("far", pools / host, SIZE, remote.uri, 4 * MIB, **keys) for host in ("here", "there"))
        here = serve(one)
        with here.client() as client, ThreadPoolExecutor() as beside:
            remote.tell("stall", str(AT))
            written = beside.submit(write_in_vain, client, incompressible(0, 1))
            wait_until((remote.run / "stalled").exists, "the write to be stalled")
            wait_until(lambda: losses(pools / "here" / "far.pool") > 0, "its connection to be given up")
            os.kill(here.pid, signal.SIGSTOP)
            remote.untell("stalled")
            there = serve(two)
            with there.client() as other:
                other.pwrite(incompressible(0, 2), AT)
                other.flush()
                os.kill(here.pid, signal.SIGCONT)
                written.result()
                wait_until(lambda: "nothing is served here any more" in here.log(), "the lease to be lost")
            with (remote.run / "disk").open("rb") as disk:
                disk.seek(AT)
                assert disk.read(4096) == incompressible(0, 2)
