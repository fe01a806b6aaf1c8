# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: directories that are removed on every path, and servers that are reaped on every path."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.support import leftovers
from tests.support.harness import Door, Serve, Server

# A slow machine is no fault; and what continuous integration finds is to be the change's doing, not chance's.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("tests")


# Who shares something, and is therefore left to one worker. All other tests are given out one by one.
GROUPS = {
    "tests/vm/test_systemd.py": "build in the source tree",
    "tests/unit/test_packaging.py": "build in the source tree",
    # Of guests, which take a processor each, so much together that one worker is done with it when another is.
    "tests/vm/test_guest.py": "guests of whole systems",
    "tests/vm/test_fs_cache.py": "guests of whole systems",
    "tests/vm/test_migration.py": "guests of few programs",
    "tests/vm/test_vhost.py": "guests of few programs",
    "tests/vm/test_libvirt.py": "guests of libvirt's",
    "tests/vm/": "other guests",
    "tests/nbd/test_pressure.py": "memory of this host",
    "tests/crash/test_swap_area.py": "memory of this host",
    "tests/core/": "the core, compiled with sanitizers",
    "tests/vhost/test_door.py": "the door, compiled with sanitizers",
}


def group_of(nodeid: str) -> str:
    return next((group for prefix, group in GROUPS.items() if nodeid.startswith(prefix)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group_of
    return scheduler


def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor: half of the time tests wait for what they started. Three leave guests too little."""
    return 2 * len(os.sched_getaffinity(0))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In parallel the longest first, so that none is left when all others have ended."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("vm", "slow")])


def pytest_sessionstart() -> None:
    # Who is started in the background ignores SIGINT, and so would all programs that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leftovers.own_mounts()
    leftovers.sweep()


@pytest.fixture
def pools() -> Iterator[Path]:
    """An empty directory in tmpfs."""
    with leftovers.directory("/dev/shm") as path:
        path.chmod(0o711)
        free = path / "base"  # the other is locked
        free.mkdir(mode=0o700)
        yield free


@pytest.fixture
def disks() -> Iterator[Path]:
    """A directory on disk."""
    with leftovers.directory("/var/tmp") as path:
        yield path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A path for a backing file."""
    return tmp_path / "backing"


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 2 MiB."""
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("losetup needs root")
    image = tmp_path / "loop"
    image.write_bytes(bytes(2 << 20))
    result = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"losetup: {result.stderr.strip()}")
    path = Path(result.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", str(path)], check=True)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers: serve(parameters, options=..., wrapper=..., door=...) returns one that accepts connections."""
    servers: list[Server] = []

    def start(
        parameters: list[str], options: tuple[str, ...] = (), wrapper: tuple[str, ...] = (), door: Door = "nbd"
    ) -> Server:
        run = tmp_path / f"run{len(servers)}"
        run.mkdir()
        servers.append(Server(run, parameters, options, wrapper, door))
        return servers[-1].start()

    try:
        yield start
    finally:
        for server in servers:
            server.kill()
