# SPDX-License-Identifier: BSD-3-Clause
"""A swap area after its host died: what looks at it and what makes it anew still work."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, Serve, Server, device, wait_until

SIZE = 64 * MIB
TOOLS = ("nbdfuse", "losetup", "mkswap", "blkid", "swapon", "swapoff")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(tool for tool in TOOLS if not shutil.which(tool))}"
    ),
]


def run(*command: str | Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def loop_device(server: Server, directory: Path) -> Iterator[Path]:
    """The device as a block device of this machine, for the length of a with block."""
    with contextlib.ExitStack() as undo:
        mount = directory / "fuse"
        mount.touch()
        fuse = subprocess.Popen(["nbdfuse", mount, f"nbd+unix:///?socket={server.socket}"])
        undo.callback(fuse.wait)
        undo.callback(lambda: subprocess.run(["umount", mount], check=False))
        wait_until(lambda: mount.stat().st_size == SIZE or fuse.poll() is not None, "nbdfuse")
        path = run("losetup", "--find", "--show", "--direct-io=on", mount).strip()
        undo.callback(run, "losetup", "--detach", path)
        yield Path(path)


def host_death(server: Server, pool: Path) -> None:
    """All that a dead host takes with it: the process and the pool."""
    server.kill()
    pool.unlink()
    server.start()


@pytest.fixture
def server(serve: Serve, pools: Path, disk: Path, tmp_path: Path) -> Server:
    """A device with a swap signature and pages in it, whose host died."""
    server = serve(device("swap", pools, SIZE, disk, "16M"))
    with loop_device(server, tmp_path) as path:
        run("mkswap", "--label", "before", path)
    with server.client() as client:
        for page in range(1, SIZE // PAGE, 8):
            client.pwrite(compressible(page, 1), page * PAGE)
    host_death(server, pools / "swap.pool")
    return server


def test_blkid_mkswap_and_swapon_work_after_the_host_died(server: Server, tmp_path: Path) -> None:
    with server.client() as client, pytest.raises(nbd.Error):
        client.pread(PAGE, 201 * PAGE)
    with loop_device(server, tmp_path) as path:
        assert 'LABEL="before"' in run("blkid", "--probe", path)
        swap_on_and_off(path)
        run("mkswap", "--label", "after", path)
        assert 'LABEL="after"' in run("blkid", "--probe", path)
        swap_on_and_off(path)


def swap_on_and_off(path: Path) -> None:
    """The kernel accepts the area; nothing else swaps to it, for its priority is the lowest."""
    run("swapon", "--priority", "0", path)
    try:
        assert str(path) in Path("/proc/swaps").read_text()
    finally:
        run("swapoff", path)
