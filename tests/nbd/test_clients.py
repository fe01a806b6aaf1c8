# SPDX-License-Identifier: BSD-3-Clause
"""One client at a time: real ones, over unix sockets and TCP."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import nbd
import pytest

from tests.support import leftovers
from tests.support.content import PAGE, content
from tests.support.gate import Gate
from tests.support.harness import MIB, ROOT, Control, Serve, Server, counters, device, environment, wait_until

SIZE = 4 * MIB
CLIENT = """
import sys, nbd
client = nbd.NBD()
client.connect_uri(sys.argv[1])
print("connected", flush=True)
for line in sys.stdin:
    page, byte = map(int, line.split())
    client.pwrite(bytes([byte]) * 4096, page * 4096)
    print("written", flush=True)
"""


def unix(server: Server, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={server.socket}"


@contextmanager
def another(uri: str) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own, connected; it writes a page for each line 'PAGE BYTE'."""
    command = leftovers.dying_with_us([sys.executable, "-c", CLIENT, uri])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "connected\n"
            yield process
        finally:
            process.kill()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.fixture
def server(serve: Serve, pools: Path, disk: Path) -> Server:
    return serve(device("web", pools, SIZE, disk, "8M"))


def test_a_second_client_is_refused_and_told_who_has_the_device(server: Server) -> None:
    with another(unix(server)) as first:
        with pytest.raises(nbd.Error):
            server.connect()
        in_use = rf"web is in use by process {first.pid} \(\S+\)"
        assert re.search(rf"open: error: {in_use}: one client at a time, or clients=any\n$", server.log())
        assert first.stdin
        assert first.stdout
        print("3 7", file=first.stdin, flush=True)
        assert first.stdout.readline() == "written\n"
    with server.client() as second:
        assert second.pread(PAGE, 3 * PAGE) == b"\7" * PAGE
    assert "Traceback" not in server.log()


def test_connections_of_one_process_are_one_client(server: Server, tmp_path: Path) -> None:
    with server.client() as one, server.client() as other:
        one.pwrite(b"1" * PAGE, 0)
        assert other.pread(PAGE, 0) == b"1" * PAGE
    image = tmp_path / "image"
    image.write_bytes(b"".join(content(page, 1) for page in range(SIZE // PAGE)))
    several = "--connections=4", "--threads=4", "--request-size=65536"
    assert run("nbdcopy", *several, image, unix(server)).returncode == 0
    assert run("nbdcopy", *several, unix(server), tmp_path / "copy").returncode == 0
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert run("nbdinfo", unix(server)).returncode == 0


def test_a_killed_client_has_left_at_once(server: Server) -> None:
    for _ in range(20):
        with another(unix(server)) as first:
            first.kill()
            with server.client() as client:
                assert client.pread(1, 0) == b"\0"


def test_who_comes_after_a_killed_client_waits_for_its_last_write(
    serve: Serve, pools: Path, disk: Path, tmp_path: Path
) -> None:
    gate = Gate(tmp_path, disk)
    server = serve(device("web", pools, SIZE, disk, "8M"), wrapper=gate.wrapper)
    with Control(pools / "web.pool") as control, ThreadPoolExecutor(1) as pool:
        control.frozen(True)
        with gate.closed():
            with another(unix(server)) as first:
                assert first.stdin
                print("300 1", file=first.stdin, flush=True)
                gate.wait_for(1, "the write to reach the disk")
            entering = pool.submit(server.connect)
            with pytest.raises(nbd.Error):
                entering.result()
            entering = pool.submit(server.connect)
        second = entering.result()
    second.pwrite(b"2" * PAGE, 300 * PAGE)
    assert second.pread(PAGE, 300 * PAGE) == b"2" * PAGE
    assert counters(pools / "web.pool").spills == 2
    second.shutdown()


def test_any_number_of_clients_where_they_are_allowed(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("web", pools, SIZE, disk, "8M", clients="any"))
    with another(unix(server)), another(unix(server)), server.client() as client:
        assert client.pread(1, 0) == b"\0"


def test_those_who_cannot_write_may_be_many(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("web", pools, SIZE, disk, "8M"), options=("--readonly",))
    with another(unix(server)), another(unix(server)), server.client() as client:
        assert client.is_read_only()


def test_each_device_has_a_client_of_its_own(serve: Serve, pools: Path, tmp_path: Path) -> None:
    parameters = [word for name in ("a", "b") for word in device(name, pools, SIZE, tmp_path / name, "8M")]
    server = serve(parameters)
    with another(unix(server, "a")), another(unix(server, "b")) as holder:
        with pytest.raises(nbd.Error):
            server.connect("b")
        assert f"b is in use by process {holder.pid} (" in server.log()


@pytest.mark.parametrize("value", ["2", "many", "ONE"])
def test_a_number_of_clients_is_one_or_any(pools: Path, disk: Path, value: str) -> None:
    parameters = device("web", pools, SIZE, disk, "8M", clients=value)
    command = ["nbdkit", "-f", "-U", "-", "python", ROOT / "plugin/tmem.py", *parameters]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"nbdkit: tmem: error: web: clients={value} is neither one nor any\n"


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


@contextmanager
def over_tcp(run_: Path, parameters: list[str], wrapper: list[str]) -> Iterator[tuple[str, Path]]:
    """The devices on the loopback; yields the URI of one and the log."""
    port, pid_file, log = free_port(), run_ / "pid", run_ / "log"
    serve = [*wrapper, str(ROOT / "scripts/serve"), "--port", str(port), "--pid-file", str(pid_file), *parameters]
    with log.open("wb") as file, subprocess.Popen(leftovers.dying_with_us(serve), stderr=file) as process:
        try:
            wait_until(lambda: pid_file.exists() or process.poll() is not None, "nbdkit to listen")
            assert process.poll() is None, log.read_text()
            yield f"nbd://127.0.0.1:{port}", log
        finally:
            process.kill()


def connect(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def test_over_tcp_processes_of_this_machine_are_told_apart(pools: Path, disk: Path, tmp_path: Path) -> None:
    with over_tcp(tmp_path, device("web", pools, SIZE, disk, "8M"), []) as (uri, log):
        first, second = connect(uri), connect(uri)
        assert run(sys.executable, "-c", CLIENT, uri).returncode == 1
        assert f"web is in use by process {os.getpid()} (" in log.read_text()
        for handle in (first, second):
            handle.shutdown()
        assert run("nbdinfo", uri).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run a server as another user")
def test_over_tcp_whose_process_is_hidden_has_one_connection(pools: Path, disks: Path) -> None:
    for path in (pools, disks):
        shutil.chown(path, "nobody", "nogroup")
    as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    with over_tcp(disks, device("web", pools, SIZE, "none", "8M"), as_nobody) as (uri, log):
        first = connect(uri)
        with pytest.raises(nbd.Error):
            connect(uri)
        assert re.search(r"web is in use by port \d+ of 127\.0\.0\.1: one client", log.read_text())
        first.shutdown()
        connect(uri).shutdown()


QEMU = shutil.which("qemu-system-x86_64")


@pytest.mark.skipif(not QEMU, reason="needs qemu-system-x86_64")
def test_a_second_qemu_does_not_start(server: Server) -> None:
    blockdev = f"driver=nbd,node-name=tmem,server.type=unix,server.path={server.socket},export=web"
    qemu = [str(QEMU), "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", "-blockdev", blockdev]
    with subprocess.Popen(leftovers.dying_with_us(qemu), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout
            assert b"QMP" in first.stdout.readline()
            second = subprocess.run(qemu, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert "Requested export not available" in second.stderr
            assert f"web is in use by process {first.pid} (qemu-system-x86)" in server.log()
        finally:
            first.kill()
