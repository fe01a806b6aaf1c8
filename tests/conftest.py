"""Fixtures: directories that are removed on every path, and servers that are reaped on every path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Server

Serve = Callable[..., Server]


@pytest.fixture
def pools() -> Iterator[Path]:
    """An empty directory in tmpfs."""
    directory = Path(tempfile.mkdtemp(prefix="tmemd-test-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A path for a backing file."""
    return tmp_path / "backing"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers: serve(parameters, options=..., wrapper=...) returns one that accepts connections."""
    servers: list[Server] = []

    def start(parameters: list[str], options: tuple[str, ...] = (), wrapper: tuple[str, ...] = ()) -> Server:
        run = tmp_path / f"run{len(servers)}"
        run.mkdir()
        servers.append(Server(run, parameters, options, wrapper))
        return servers[-1].start()

    try:
        yield start
    finally:
        for server in servers:
            server.kill()
