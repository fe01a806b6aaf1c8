"""Devices that have their pools from a tmemd: control through its socket, and what happens when either side dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.content import PAGE, content
from tests.crash.writers import Ledger, Writers, pages
from tests.harness import MIB, ROOT, Server, device, environment, nbdkit_command, wait_until
from tests.unit import fakes
from tmemd.cli import main
from tmemd.client import Client
from tmemd.poolfile import PoolError

PAGES = 2048
LIMIT = 8 * MIB


class Restarted:
    """A tmemd that is killed and comes back."""

    def __init__(self, base: Path, *options: str) -> None:
        self._base = base
        self._options = options
        self.running = fakes.start_tmemd(base, *options)

    def kill(self) -> None:
        """SIGKILL."""
        self.running.stop(signal.SIGKILL)

    def start(self) -> None:
        """Come back."""
        self.running = fakes.start_tmemd(self._base, *self._options)

    @property
    def client(self) -> Client:
        """To ask it."""
        return self.running.client


@pytest.fixture
def tmemd(pools: Path) -> Iterator[Restarted]:
    """A tmemd whose socket and pools are below the fixture *pools*."""
    restarted = Restarted(pools)
    try:
        yield restarted
    finally:
        restarted.kill()


def managed(base: Path, backing: object, limit: object = LIMIT, **keys: object) -> list[str]:
    """A device that has its pool from the tmemd below *base*."""
    return device("web", base / "pools", PAGES * PAGE, backing, limit, tmemd=base / "socket", **keys)


def ctl(base: Path, *command: str) -> Any:
    """What tmemctl --json prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tmemd.cli", *command, "--json", f"--socket={base}/socket"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fill(server: Server, version: int = 1) -> None:
    with server.client() as client:
        for page in range(PAGES):
            client.pwrite(content(page, version), page * PAGE)


def wrong(server: Server, version: int = 1) -> list[int]:
    with server.client() as client:
        return [page for page, data in enumerate(pages(client, PAGES)) if data != content(page, version)]


def test_everything_tmemctl_does_to_a_live_device(serve: Serve, pools: Path, disk: Path, tmemd: Restarted) -> None:
    server = serve(managed(pools, disk))
    fill(server)
    (status,) = ctl(pools, "list")
    assert (status["name"], status["served"], status["pid"], status["target_bytes"]) == ("web", True, server.pid, LIMIT)
    assert status["backing"] == str(disk)
    assert 0 < status["pages_in_tmem"] < status["puts"]

    half = status["used_bytes"] // 2
    ctl(pools, "set", "web", f"--target={half}")
    wait_until(lambda: tmemd.client.pool("web").counters.used_bytes <= half, "the pool to shrink")
    assert wrong(server) == []

    ctl(pools, "set", "web", f"--target={LIMIT}")
    ctl(pools, "freeze", "web")
    before = ctl(pools, "show", "web")
    fill(server, 2)
    after = ctl(pools, "show", "web")
    assert after["puts_refused"] > before["puts_refused"]
    assert after["pages_in_tmem"] <= before["pages_in_tmem"]
    ctl(pools, "thaw", "web")
    fill(server, 3)
    assert ctl(pools, "show", "web")["pages_in_tmem"] > after["pages_in_tmem"]

    used = ctl(pools, "show", "web")["used_bytes"]
    assert ctl(pools, "demote", "web", "1M")["used_bytes"] <= used - MIB
    assert ctl(pools, "settle", "web")["done_error"] == 0
    counts = ctl(pools, "map", "web")["counts"]
    assert counts["tmem"] > 0 < counts["file"]
    assert sum(counts.values()) == PAGES
    assert ctl(pools, "drain", "web")["pages_in_tmem"] == 0
    assert ctl(pools, "map", "web")["counts"]["tmem"] == 0
    assert wrong(server, 3) == []
    assert server.stop() == 0
    (report,) = ctl(pools, "check", "--strict", "web")
    assert report["ok"]
    ctl(pools, "destroy", "web")
    assert list((pools / "pools").iterdir()) == []
    assert wrong(serve(managed(pools, disk)), 3) == []


def test_sigkill_of_tmemd_under_load_fails_no_request(serve: Serve, pools: Path, disk: Path, tmemd: Restarted) -> None:
    server = serve(managed(pools, disk))
    ledger = Ledger(PAGES)
    rng = random.Random(1)
    minimum = tmemd.client.pool("web").counters.minimum_bytes
    writers = Writers(server.socket, "", ledger, 1)
    try:
        for _ in range(100):
            target = rng.randint(minimum, LIMIT)
            tmemd.client.set_target("web", target)
            tmemd.client.set_frozen("web", rng.random() < 0.2)
            if rng.random() < 0.3:
                tmemd.client.ask("web", "drain")
            ledger.wait_for(rng.randrange(20), writers.stop)
            tmemd.kill()
            ledger.wait_for(20, writers.stop)
            tmemd.start()
            status = tmemd.client.pool("web")
            assert (status.served, status.target_bytes) == (True, target)
    finally:
        writers.stop.set()
        writers.join()
    assert writers.failed == []
    with server.client() as client:
        ledger.verify(client)
    counters = tmemd.client.pool("web").counters
    assert (counters.bad_checksums, counters.io_errors) == (0, 0)
    assert counters.puts_refused > 0


def test_a_plugin_killed_and_started_again_finds_its_pages(
    serve: Serve, pools: Path, disk: Path, tmemd: Restarted
) -> None:
    server = serve(managed(pools, disk))
    fill(server)
    in_tmem = tmemd.client.pool("web").counters.pages_in_tmem
    server.kill()
    assert not tmemd.client.pool("web").served
    with pytest.raises(PoolError, match=f"{in_tmem} pages in tmem"):
        tmemd.client.destroy("web")
    server.start()
    assert tmemd.client.pool("web").counters.pages_in_tmem == in_tmem
    assert wrong(server) == []


def test_a_plugin_that_starts_while_tmemd_is_away_goes_on_with_its_last_target(
    serve: Serve, pools: Path, disk: Path, tmemd: Restarted
) -> None:
    server = serve(managed(pools, disk))
    fill(server)
    tmemd.client.set_target("web", LIMIT // 2)
    server.kill()
    tmemd.kill()
    server.start()
    assert wrong(server) == []
    tmemd.start()
    status = tmemd.client.pool("web")
    assert (status.served, status.target_bytes) == (True, LIMIT // 2)
    tmemd.client.set_frozen("web", True)


def refusal(base: Path, disk: Path) -> str:
    """What nbdkit says when it cannot have the device."""
    command = nbdkit_command(disk.with_name("nbd.sock"), managed(base, disk))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not disk.exists()
    return done.stderr


@pytest.mark.usefixtures("tmemd")
def test_what_tmemd_refuses_is_not_opened_by_its_path_instead(pools: Path, disk: Path) -> None:
    with fakes.pool(pools / "pools", "web", size=MIB) as fd:
        assert "of a device of 1048576 bytes" in refusal(pools, disk)
        if os.geteuid() == 0:
            os.fchown(fd, 12345, 12345)
            assert "belongs to another user" in refusal(pools, disk)


def test_without_tmemd_a_new_device_is_refused_and_leaves_nothing(pools: Path, disk: Path) -> None:
    (pools / "pools").mkdir()
    assert "tmemd" in refusal(pools, disk)
    assert list((pools / "pools").iterdir()) == []


def test_without_a_limit_of_its_own_the_target_alone_binds(serve: Serve, pools: Path, disk: Path) -> None:
    tmemd = Restarted(pools)
    try:
        parameters = [word for word in managed(pools, disk) if not word.startswith("limit=")]
        server = serve(parameters)
        tmemd.client.set_target("web", 4 * MIB)
        fill(server)
        status = tmemd.client.pool("web")
        assert status.target_bytes == 4 * MIB
        assert status.counters.used_bytes <= 4 * MIB
        tmemd.client.set_target("web", 32 * MIB)
        fill(server, 2)
        assert tmemd.client.pool("web").counters.used_bytes > 4 * MIB
        assert wrong(server, 2) == []
    finally:
        tmemd.kill()


@pytest.mark.usefixtures("tmemd")
def test_an_idle_pool_is_drained_into_its_file(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(managed(pools, disk))
    fill(server)
    server.kill()
    assert ctl(pools, "show", "web")["pages_in_tmem"] > 0
    assert ctl(pools, "drain", "web")["pages_in_tmem"] == 0
    ctl(pools, "destroy", "web")
    server.start()
    assert wrong(server) == []


def test_a_drain_that_finds_no_map_says_so_and_keeps_the_pages(
    serve: Serve, pools: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(device("web", pools, PAGES * PAGE, disk, "16M"))
    fill(server)
    server.kill()
    map_path = Path(f"{disk}.map")
    map_path.rename(disk.with_name("aside"))
    assert main(["drain", "web", f"--pools={pools}"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("tmemctl: ")
    assert f"has no map ({map_path})" in complaint
    disk.with_name("aside").rename(map_path)
    server.start()
    assert wrong(server) == []


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the user nobody, on disk."""
    if os.geteuid():
        pytest.skip("needs root to run a plugin as another user")
    path = Path(tempfile.mkdtemp(prefix="tmemd-test-", dir="/var/tmp"))
    shutil.chown(path, "nobody", "nogroup")
    try:
        yield path
    finally:
        shutil.rmtree(path)


def test_a_plugin_of_another_user_has_its_pool_and_root_drains_it_as_that_user(pools: Path, home: Path) -> None:
    pools.chmod(0o755)
    tmemd = Restarted(pools, "--allow-user=nobody", "--group=nogroup")
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    server = Server(home, managed(pools, home / "backing"), wrapper=as_nobody)
    try:
        server.start()
        fill(server)
        assert (pools / "pools/web.pool").owner() == "nobody"
        assert tmemd.client.pool("web").served
        server.kill()
        assert ctl(pools, "drain", "web")["pages_in_tmem"] == 0
        assert (home / "backing").owner() == "nobody"
        ctl(pools, "destroy", "web")
        server.start()
        assert wrong(server) == []
    finally:
        server.kill()
        tmemd.kill()
