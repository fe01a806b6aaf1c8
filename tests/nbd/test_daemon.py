# SPDX-License-Identifier: BSD-3-Clause
"""Devices that have their pools from a tmemd: control through its socket, and what happens when either side dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import fakes, leftovers
from tests.support.content import PAGE, content
from tests.support.harness import MIB, ROOT, Serve, Server, connect, device, environment, nbdkit_command, wait_until
from tests.support.writers import Ledger, Writers, pages
from tmemd.cli import main
from tmemd.client import Client, UnreachableError
from tmemd.settings import PoolSettings
from tmemd.store.poolfile import PoolError

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


def managed(base: Path, backing: object, limit: object = LIMIT, *, name: str = "web", **keys: object) -> list[str]:
    """A device that has its pool from the tmemd below *base*."""
    return device(name, base / "pools", PAGES * PAGE, backing, limit, tmemd=base / "socket", **keys)


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
    wait_until(lambda: ctl(pools, "freeable", "web")["pools"][0]["incompressible_bytes"] > 0, "age statistics")
    assert ctl(pools, "demote", "web", "--incompressible")["used_bytes"] > 0
    wait_until(lambda: ctl(pools, "freeable", "web")["pools"][0]["incompressible_bytes"] == 0, "newer age statistics")
    (long,) = ctl(pools, "list", "--long")
    assert sum(age["stored_bytes"] for age in long["stored_by_age"]) > 0
    assert 0 < long["put_seconds"]["median"] <= long["put_seconds"]["p99"]
    assert long["compression_ratio"] > 1
    assert ctl(pools, "host")["used_bytes"] > 0
    assert ctl(pools, "compact", "web")["used_bytes"] <= used
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


def random_change(rng: random.Random) -> dict[str, Any]:
    """A change of settings, as Client.set takes it, that is right whatever was set before; or of 'frozen'."""
    if rng.random() < 0.3:
        return {"frozen": rng.random() < 0.3}
    changes: dict[str, Any] = {
        "weight": rng.randint(1, 1000),
        "cap": rng.choice([None, rng.randint(6 * MIB, LIMIT)]),
        "minimum": rng.randint(0, 2 * MIB),
        "target": rng.choice([None, None, rng.randint(3 * MIB, 5 * MIB)]),
        "compression": rng.random() < 0.7,
    }
    return {name: changes[name] for name in rng.sample(sorted(changes), rng.randint(1, len(changes)))}


def send_change(client: Client, name: str, change: dict[str, Any]) -> None:
    if "frozen" in change:
        client.set_frozen(name, change["frozen"])
    else:
        client.set(name, **change)


def change_until_killed(
    client: Client, rng: random.Random, expected: dict[str, PoolSettings]
) -> tuple[str, PoolSettings]:
    """Change settings until tmemd is gone, noting those it acknowledged; returns the change that got no answer."""
    while True:
        name = rng.choice(sorted(expected))
        change = random_change(rng)
        new = msgspec.structs.replace(expected[name], **change)
        try:
            send_change(client, name, change)
        except UnreachableError:
            return name, new
        expected[name] = new
        if rng.random() < 0.1:
            with contextlib.suppress(PoolError):  # tmemd may be gone, and the queue may be full
                client.ask(name, "drain")


def kill_after(tmemd: Restarted, ledger: Ledger, requests: int) -> None:
    """SIGKILL when the device has acknowledged so many requests more."""
    ledger.wait_for(requests, threading.Event())
    tmemd.kill()


@contextlib.contextmanager
def writing(sockets: dict[str, Path]) -> Iterator[dict[str, Ledger]]:
    """Writers on every device, none of which may fail, and afterwards every page is checked."""
    ledgers = {name: Ledger(PAGES) for name in sockets}
    writers = [
        Writers(ledgers[name], seed, partial(connect, path), threads=2)
        for seed, (name, path) in enumerate(sockets.items())
    ]
    try:
        yield ledgers
    finally:
        for each in writers:
            each.stop.set()
        for each in writers:
            each.join()
    assert [each.failed for each in writers] == [[] for _ in writers]
    for name, path in sockets.items():
        client = connect(path)
        ledgers[name].verify(client)
        client.shutdown()


@pytest.mark.slow
def test_sigkill_of_tmemd_under_load_fails_no_request_and_loses_no_setting(
    serve: Serve, pools: Path, tmp_path: Path
) -> None:
    (pools / "config").write_text(f"[budget]\nminimum = {2 * LIMIT}\nmaximum = {2 * LIMIT}\nreserve = 0\n")
    tmemd = Restarted(pools, f"--config={pools}/config")
    rng = random.Random(1)
    try:
        sockets = {name: serve(managed(pools, tmp_path / name, name=name)).socket for name in ("a", "b", "c")}
        expected = {name: PoolSettings() for name in sockets}
        with writing(sockets) as ledgers:
            for _ in range(40):
                busy = rng.choice(list(ledgers.values()))
                killer = threading.Thread(target=kill_after, args=(tmemd, busy, rng.randrange(30)), daemon=True)
                killer.start()
                name, unanswered = change_until_killed(tmemd.client, rng, expected)
                killer.join()
                busy.wait_for(20, threading.Event())
                tmemd.start()
                found = {status.name: status for status in tmemd.client.pools()}
                if found[name].settings == unanswered:
                    expected[name] = unanswered
                assert {name: status.settings for name, status in found.items()} == expected
                assert all(status.served for status in found.values())
                assert [status.frozen for status in found.values()] == [each.frozen for each in expected.values()]
                fixed = {name: each.target for name, each in expected.items() if each.target is not None}
                assert {name: found[name].target_bytes for name in fixed} == fixed
            for name in sockets:
                tmemd.client.set_frozen(name, False)
                tmemd.client.set(name, target=3 * MIB, cap=None, minimum=0)
            tmemd.kill()
            tmemd.start()
            assert [status.target_bytes for status in tmemd.client.pools()] == [3 * MIB] * 3
            for name in sockets:
                tmemd.client.set(name, target=None)
            wait_until(lambda: tmemd.client.host().targets_bytes > 9 * MIB, "targets to be found again")
        counters = [status.counters for status in tmemd.client.pools()]
        assert [(each.bad_checksums, each.io_errors) for each in counters] == [(0, 0)] * 3
        assert all(each.puts_refused for each in counters)
    finally:
        tmemd.kill()


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


def test_a_drain_that_finds_no_bitmap_says_so_and_keeps_the_pages(
    serve: Serve, pools: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(device("web", pools, PAGES * PAGE, disk, "16M"))
    fill(server)
    server.kill()
    bitmap_path = Path(f"{disk}.map")
    bitmap_path.rename(disk.with_name("aside"))
    assert main(["drain", "web", f"--pools={pools}"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("tmemctl: ")
    assert f"has no bitmap ({bitmap_path})" in complaint
    disk.with_name("aside").rename(bitmap_path)
    server.start()
    assert wrong(server) == []


def test_without_a_tmemd_a_target_holds_until_it_is_auto(serve: Serve, pools: Path, disk: Path) -> None:
    client = Client.of_directory(pools)
    server = serve(device("web", pools, PAGES * PAGE, disk, LIMIT))
    fill(server)
    full = client.pool("web").counters.used_bytes
    client.set_target("web", full // 2)
    wait_until(lambda: client.pool("web").counters.used_bytes <= full // 2, "the pool to shrink")
    fill(server, 2)
    assert client.pool("web").counters.used_bytes <= full // 2
    client.set("web", target=None)
    fill(server, 3)
    status = client.pool("web")
    assert (status.target_bytes, status.counters.used_bytes > full // 2) == (LIMIT, True)
    assert wrong(server, 3) == []


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the user nobody, on disk."""
    if os.geteuid():
        pytest.skip("needs root to run a plugin as another user")
    with leftovers.directory("/var/tmp") as path:
        shutil.chown(path, "nobody", "nogroup")
        yield path


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
