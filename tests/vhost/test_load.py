# SPDX-License-Identifier: BSD-3-Clause
"""The load that tests and benchmarks use, against QEMU's doors and nbdkit's: it notices what it is there to notice."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.content import PAGE
from tests.support.harness import DEADLINE, MIB, Door, wait_until
from tests.support.leftovers import dying_with_us
from tests.support.load import Load, Option, build, load

SIZE = 8 * MIB
PAGES = SIZE // PAGE
QUEUES = 3
DOORS: tuple[Door, ...] = ("nbd", "vhost")
qemu = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="no qemu-storage-daemon")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()


@pytest.fixture
def daemon(tmp_path: Path, file: Path, request: pytest.FixtureRequest) -> Iterator[dict[Door, Path]]:
    """QEMU serves the file through both doors: their sockets."""
    writable = getattr(request, "param", "on")
    sockets: dict[Door, Path] = {door: tmp_path / f"{door}.sock" for door in DOORS}
    address = {door: f"addr.type=unix,addr.path={path}" for door, path in sockets.items()}
    export = f"node-name=disk,writable={writable}"
    command = [
        "qemu-storage-daemon", "--blockdev", f"file,filename={file},discard=unmap,node-name=disk",
        "--nbd-server", address["nbd"], "--export", f"nbd,id=n,{export},name=disk",
        "--export", f"vhost-user-blk,id=v,{export},{address['vhost']},num-queues={QUEUES}",
        "--pidfile", str(tmp_path / "pid"),
    ]  # fmt: skip
    with subprocess.Popen(dying_with_us(command)) as process:
        try:
            wait_until((tmp_path / "pid").exists, "qemu-storage-daemon")
            yield sockets
        finally:
            process.kill()


def check(sockets: dict[Door, Path], ledger: Path) -> dict[Door, int]:
    """How many pages are wrong when all are read, by door."""
    return {
        door: load(door, socket, export="disk", verify=ledger, sequential=True, count=PAGES, depth=8).wrong
        for door, socket in sockets.items()
    }


@qemu
@pytest.mark.parametrize("options", [{}, {"queues": QUEUES, "block": 2 * PAGE}, {"plain": True}, {"spin": True}])
def test_both_doors_show_what_either_wrote(
    daemon: dict[Door, Path], tmp_path: Path, options: dict[str, int | bool]
) -> None:
    ledger = tmp_path / "ledger"
    known: dict[str, Option] = {"mix": "4:5:1", "verify": ledger, "export": "disk", "count": 3000, "depth": 16}
    with (
        Load("nbd", daemon["nbd"], seed=1, **known) as other,
        Load("vhost", daemon["vhost"], seed=2, **known, **options) as own,
    ):
        for report in (other.report(), own.report()):
            assert (report.requests, report.failed, report.wrong) == (3000, 0, 0)
    assert check(daemon, ledger) == dict.fromkeys(DOORS, 0)
    assert any(ledger.read_bytes())


@qemu
def test_a_wrong_page_is_noticed(daemon: dict[Door, Path], file: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    load("vhost", daemon["vhost"], mix="0:1", verify=ledger, sequential=True, count=PAGES)
    with file.open("r+b") as disk:
        for page in (3, 700):
            disk.seek(page * PAGE + 99)
            disk.write(b"?!")
    assert check(daemon, ledger) == dict.fromkeys(DOORS, 2)


@qemu
@pytest.mark.parametrize("daemon", ["off"], indirect=True)
@pytest.mark.parametrize("door", DOORS)
def test_failed_requests_are_counted(daemon: dict[Door, Path], tmp_path: Path, door: Door) -> None:
    ledger = tmp_path / "ledger"
    report = load(door, daemon[door], export="disk", mix="0:1", count=10, sequential=True, verify=ledger)
    assert (report.requests, report.failed) == (10, 10)
    # What is in a page whose write failed is not known.
    report = load(door, daemon[door], export="disk", seconds=0.01, blocks=20, verify=ledger)
    assert report.requests > 0
    assert report.wrong == 0


@contextlib.contextmanager
def nbdkit(directory: Path, file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Nbdkit serves the file at nbd.sock."""
    socket, pid = directory / "nbd.sock", directory / "nbdkit.pid"
    for left_over in (socket, pid):
        left_over.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-U", str(socket), "-P", str(pid), "file", str(file)]
    with subprocess.Popen(dying_with_us(command)) as process:
        try:
            wait_until(pid.exists, "nbdkit")
            yield process
        finally:
            process.kill()


def has_changed(file: Path, before: bytes) -> bool:
    return file.read_bytes() != before


def test_a_server_may_die(tmp_path: Path, file: Path) -> None:
    ledger = tmp_path / "ledger"
    known: dict[str, Option] = {"mix": "1:1", "verify": ledger, "reconnect": DEADLINE, "count": 100_000, "depth": 32}
    with contextlib.ExitStack() as servers:
        servers.enter_context(nbdkit(tmp_path, file))
        with Load("nbd", tmp_path / "nbd.sock", **known) as running:
            wait_until(ledger.exists, "the connection")
            for _ in range(3):
                before = ledger.read_bytes()
                wait_until(partial(has_changed, ledger, before), "a write")
                servers.close()
                servers.enter_context(nbdkit(tmp_path, file))
            report = running.report()
    assert (report.requests, report.failed, report.wrong, report.returns) == (100_000, 0, 0, 3)


def test_without_patience_the_load_ends_with_its_server(tmp_path: Path, file: Path) -> None:
    ledger = tmp_path / "ledger"
    with (
        nbdkit(tmp_path, file) as server,
        Load("nbd", tmp_path / "nbd.sock", verify=ledger, seconds=DEADLINE) as running,
    ):
        wait_until(ledger.exists, "the connection")
        server.kill()
        with pytest.raises(RuntimeError, match="the server: has gone"):
            running.report()


def test_nothing_is_asked_of_a_device_at_rest(tmp_path: Path, file: Path) -> None:
    with nbdkit(tmp_path, file) as server:
        report = load("nbd", tmp_path / "nbd.sock", rate=0, seconds=0.05, pid=server.pid)
        assert (report.requests, report.seconds >= 0.05) == (0, True)
        assert load("nbd", tmp_path / "nbd.sock", rate=50, seconds=0.1).requests <= 5


def test_more_is_under_way_than_a_socket_holds(tmp_path: Path, file: Path) -> None:
    with nbdkit(tmp_path, file):
        report = load(
            "nbd", tmp_path / "nbd.sock", mix="1:1", verify=tmp_path / "ledger", depth=128, block=8 * PAGE, count=20_000
        )
    assert (report.requests, report.failed, report.wrong) == (20_000, 0, 0)
