# SPDX-License-Identifier: BSD-3-Clause
"""256 pools on one tmemd: some are served by one nbdkit, the rest are idle."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, Serve, device, wait_until
from tests.support.scrape import free_port, get
from tmemd.client import attach_pool

SERVED = [f"served{n}" for n in range(64)]
IDLE = [f"idle{n}" for n in range(192)]
NAMES = sorted(SERVED + IDLE)


@contextmanager
def attached(running: fakes.Tmemd, names: list[str]) -> Iterator[None]:
    """Pools as plugins leave them, attached through tmemd."""
    with ExitStack() as stack:
        for name in names:
            fd, _ = attach_pool(running.socket, running.attach(name))
            stack.callback(os.close, fd)
            fakes.finish_pool(fd, name)
        yield


def serve_devices(serve: Serve, running: fakes.Tmemd, disk: Path) -> None:
    """Serve one part of the pools, with a page in each."""
    parameters: list[str] = []
    for name in SERVED:
        keys = {"tmemd": running.socket, "reserve": "no"}
        parameters += device(name, running.directory, 4 * MIB, f"{disk}-{name}", 4 * MIB, **keys)
    server = serve(parameters, options=("--threads", "2"))
    for name in SERVED:
        with server.client(name) as client:
            client.pwrite(compressible(1, 1), PAGE * 300)


def test_256_pools_are_looked_after(pools: Path, serve: Serve, disk: Path) -> None:
    port = free_port()
    with fakes.tmemd(pools, f"--metrics=127.0.0.1:{port}") as running, attached(running, IDLE):
        serve_devices(serve, running, disk)
        client = running.client
        statuses = client.pools(long=True)
        assert [status.name for status in statuses] == NAMES
        assert sum(status.served for status in statuses) == len(SERVED)
        client.set_target("idle7", 32 * MIB)
        assert client.pool("idle7").target_bytes == 32 * MIB
        client.set_frozen(None, True)
        assert all(status.frozen for status in client.pools())
        client.set_frozen(None, False)
        assert not any(status.frozen for status in client.pools())
        exposition = get(port)[1]
        assert all(f'pool="{name}"'.encode() in exposition for name in NAMES)
        running.stop()
        start = time.monotonic()
        with fakes.tmemd(pools) as second:
            print(f"{time.monotonic() - start:.3f} s from start to listening with {len(NAMES)} pools")
            assert [status.name for status in second.client.pools()] == NAMES
            assert second.client.pool("idle7").target_bytes == 32 * MIB
            assert {status.name for status in second.client.pools()} >= set(NAMES)


def test_pools_that_are_too_many_for_its_files_leave_tmemd_reachable(base_with_pools: Path) -> None:
    with fakes.tmemd(base_with_pools, wrapper=("prlimit", "--nofile=200:200")) as running:
        statuses = running.client.pools()
        assert len(statuses) == len(IDLE)
        assert {(status.error or "LimitNOFILE").rpartition("(")[2] for status in statuses} == {
            "LimitNOFILE",
            "LimitNOFILE)",
        }
        usable = [status.name for status in statuses if status.error is None]
        assert 50 < len(usable) < len(IDLE)
        for name in usable[:30]:
            (running.directory / f"{name}.pool").unlink()
        running.client.set_frozen(usable[40], True)

        def now_usable() -> int:
            return sum(status.error is None for status in running.client.pools())

        wait_until(lambda: now_usable() == len(usable), "others to be taken up instead")


@pytest.fixture
def base_with_pools(pools: Path) -> Iterator[Path]:
    """A directory for a tmemd, with pools in it."""
    (pools / "pools").mkdir()
    with ExitStack() as stack:
        for name in IDLE:
            stack.enter_context(fakes.pool(pools / "pools", name))
        yield pools
