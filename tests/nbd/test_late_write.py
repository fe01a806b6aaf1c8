# SPDX-License-Identifier: BSD-3-Clause
"""A write that a server makes long after its connection was given up: it must not make a newer page older."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, incompressible
from tests.support.harness import MIB, Serve, Server, cache_device, device
from tests.support.remotes import Remote, volatile

SIZE = 64 * MIB
PAGE_WRITTEN = 2048


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    with volatile(tmp_path / "remote", SIZE) as server:
        yield server.start()


def write(client: nbd.NBD, version: int) -> None:
    client.pwrite(incompressible(PAGE_WRITTEN, version), PAGE_WRITTEN * PAGE)


def overtake(server: Server, remote: Remote) -> None:
    """Have a write take longer than the time-out, and write the page anew."""
    with server.client() as client:
        write(client, 1)
        remote.tell("stall")
        for version in 2, 3:  # not even on another connection, for it is not known when the first will come true
            with pytest.raises(nbd.Error):
                write(client, version)
        assert client.pread(PAGE, 2 * PAGE_WRITTEN * PAGE) == bytes(PAGE)  # one of those does answer
        remote.untell("stalled")
        write(client, 4)
        client.flush()


@pytest.mark.parametrize("kind", ["swap", "disk"])
def test_a_late_write_does_not_replace_a_newer_one(serve: Serve, pools: Path, remote: Remote, kind: str) -> None:
    keys = {"timeout": 2.0}
    if kind == "disk":
        parameters = cache_device("far", pools, remote.uri, MIB, write="through", **keys)
    else:
        parameters = device("far", pools, SIZE, remote.uri, MIB, bitmap=remote.run / "map", flush="durable", **keys)
    server = serve(parameters)
    overtake(server, remote)
    server.kill()
    (pools / "far.pool").unlink()  # the host dies: what a page is, only the server tells
    server.start()
    with server.client() as client:
        assert client.pread(PAGE, PAGE_WRITTEN * PAGE) == incompressible(PAGE_WRITTEN, 4)
