# SPDX-License-Identifier: BSD-3-Clause
"""Sources of cache devices, and what a test waits for that uses one."""

from __future__ import annotations

from pathlib import Path

from tests.support.content import compressible
from tests.support.harness import Server, counters, wait_until
from tests.support.writers import pages
from tmemd.store import poolfile


def image(path: Path, n_pages: int, version: int = 1) -> Path:
    """A source."""
    path.write_bytes(b"".join(compressible(page, version) for page in range(n_pages)))
    return path


def is_kept(pool: Path) -> bool:
    """Whether the pool names what its source holds, so that who attaches next can adopt it."""
    with pool.open("rb") as file:
        identity = poolfile.read_identity(file.fileno(), pool)
    return identity is not None and identity.uuid.version == 5


def read_all(server: Server, pool: Path, n_pages: int, version: int = 1) -> None:
    """Read every page, until all are in tmem: of those that come in at once some may not be put."""

    def are_in_tmem() -> bool:
        assert all(data == compressible(page, version) for page, data in enumerate(pages(client, n_pages)))
        return counters(pool).pages_in_tmem == n_pages

    with server.client() as client:
        wait_until(are_in_tmem, "all pages to be put")
