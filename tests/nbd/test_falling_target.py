# SPDX-License-Identifier: BSD-3-Clause
"""A target that falls far below what the pool takes: puts are refused until it has shrunk, writes never fail."""

from __future__ import annotations

from pathlib import Path

from tests.support.content import PAGE, incompressible
from tests.support.harness import MIB, Control, Serve, device

BLOCK = 512 * PAGE  # what one page of the index covers
FILLED = 64 * MIB


def test_the_index_grows_above_the_target(pools: Path, disk: Path, serve: Serve) -> None:
    """Each write to a block not used before needs a page of the index, at once."""
    server = serve(device("x", pools, 1024 * MIB, disk, 96 * MIB))
    with server.client() as client, Control(pools / "x.pool") as control:
        content = b"".join(incompressible(page, 1) for page in range(256))
        for offset in range(0, FILLED, len(content)):
            client.pwrite(content, offset)
        control.target(4 * MIB)
        for offset in range(FILLED, 1024 * MIB, BLOCK):
            client.pwrite(content[:PAGE], offset)
        for offset in range(FILLED, 1024 * MIB, BLOCK):
            assert client.pread(PAGE, offset) == content[:PAGE]
