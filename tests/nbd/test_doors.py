# SPDX-License-Identifier: BSD-3-Clause
"""One device, two doors: who is let in where, and what is said of it."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Serve, Server, device, environment, nbdkit_command, wait_until
from tests.support.vhost.protocol import Connection, Message
from tmemd.cli import main

SIZE = 4 * MIB
ONE_CLIENT = """
import sys
from pathlib import Path
from tests.support.vhost.disk import Disk
Disk(Path(sys.argv[1]), deadline=10)
"""


@pytest.fixture
def server(serve: Serve, pools: Path, disk: Path) -> Server:
    return serve(device("web", pools, SIZE, disk, "8M"), door="vhost")


def doors(pools: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    capsys.readouterr()
    assert main(["show", "web", "--pools", str(pools), "--json"]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)["doors"]
    return found


def test_what_comes_in_by_one_door_is_there_by_the_other(server: Server) -> None:
    with server.client(door="vhost") as virtio, server.client(door="nbd") as other:
        for page in range(8):
            (virtio, other)[page % 2].pwrite(content(page, 1), page * PAGE)
        for page in range(8):
            assert virtio.pread(PAGE, page * PAGE) == other.pread(PAGE, page * PAGE) == content(page, 1)
        virtio.trim(PAGE, 0)
        assert other.pread(PAGE, 0) == bytes(PAGE)


def test_show_tells_the_doors_and_what_was_done(
    server: Server, pools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (doors(pools, capsys)["nbd"], doors(pools, capsys)["vhost"]) == (0, 0)
    with server.client(door="vhost") as virtio, server.client(door="nbd"):
        virtio.pwrite(content(0, 1), 0)
        found = doors(pools, capsys)
        assert (found["nbd"], found["vhost"], found["requests"], found["failures"]) == (1, 1, 1, 0)
        assert main(["show", "web", "--pools", str(pools)]) == 0
        assert "1 by NBD, 1 by virtio (1 requests, 0 failed" in capsys.readouterr().out
    wait_until(lambda: doors(pools, capsys)["vhost"] == doors(pools, capsys)["nbd"] == 0, "the clients to be gone")


def test_what_a_killed_server_counted_as_clients_are_none(
    server: Server, pools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.client(door="nbd"):
        server.kill()
    server.start()
    assert doors(pools, capsys)["nbd"] == 0


def test_a_second_client_is_refused_whatever_the_door(server: Server) -> None:
    second = [sys.executable, "-c", ONE_CLIENT, str(server.vhost)]
    with server.client(door="nbd"):
        assert subprocess.run(second, stderr=subprocess.DEVNULL, check=False).returncode != 0
    wait_until(lambda: f"web is in use by process {os.getpid()}" in server.log(), "the log to say so")
    subprocess.run(second, check=True)


def test_who_breaks_the_rules_is_sent_away_with_a_word(server: Server) -> None:
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(server.vhost))
        front_end.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            assert front_end.recv(1) == b""
    wait_until(lambda: f"web: process {os.getpid()}" in server.log(), "the log to name it")
    with server.client(door="vhost") as virtio:
        assert virtio.pread(PAGE, 0) == bytes(PAGE)


def test_the_socket_is_for_a_group(server: Server) -> None:
    assert stat.S_IMODE(server.vhost.stat().st_mode) == 0o660


def test_the_socket_goes_with_the_server_and_a_left_over_one_is_replaced(server: Server) -> None:
    server.kill()
    assert server.vhost.exists()
    server.start()
    assert server.stop() == 0
    assert not server.vhost.exists()


def fails(pools: Path, tmp_path: Path, vhost: Path, **keys: object) -> str:
    parameters = device("web", pools, SIZE, "none", "8M", vhost=vhost, **keys)
    command = nbdkit_command(tmp_path / "unused.sock", parameters)
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 1
    return result.stderr


@pytest.mark.parametrize("kind", ["file", "link", "in use", "nowhere", "too long"])
def test_a_socket_that_cannot_be_made_is_named(kind: str, pools: Path, tmp_path: Path) -> None:
    path = tmp_path / "vhost.sock"
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "file":
            path.write_text("kept")
        elif kind == "link":
            path.symlink_to(tmp_path / "missing")
        elif kind == "in use":
            other.bind(str(path))
            other.listen()
        else:
            path = tmp_path / ("missing/vhost.sock" if kind == "nowhere" else "x" * 120)
        assert str(path) in fails(pools, tmp_path, path)
    assert kind != "file" or path.read_text() == "kept"
    assert kind != "link" or path.is_symlink()
    assert not list(pools.iterdir())


@pytest.mark.parametrize("poll", ["-1", "fast", "10001", ""])
def test_a_poll_that_is_none_is_refused(poll: str, pools: Path, tmp_path: Path) -> None:
    assert "poll=" in fails(pools, tmp_path, tmp_path / "vhost.sock", poll=poll)


def test_a_cache_device_is_read_by_several_and_written_by_nobody(serve: Serve, pools: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"".join(content(page, 1) for page in range(SIZE // PAGE)))
    server = serve([f"{key}={value}" for key, value in {
        "name": "golden", "source": image, "limit": "8M", "pools": pools,
    }.items()], door="vhost")  # fmt: skip
    with server.client() as one, server.client() as other, server.client(door="nbd") as third:
        assert one.is_read_only()
        for client in (one, other, third):
            assert client.pread(PAGE, 5 * PAGE) == content(5, 1)
        with pytest.raises((nbd.Error, OSError)):
            one.pwrite(content(0, 2), 0)
    assert image.read_bytes()[:PAGE] == content(0, 1)


def test_who_asks_for_a_reply_gets_one_whatever_was_agreed_on(server: Server) -> None:
    """QEMU 7.2 negotiates nothing anew when its server was restarted while the guest was stopped."""
    connection = Connection.to(server.vhost)
    connection.acknowledged = True
    connection.tell(Message.SET_OWNER)
    with pytest.raises(nbd.Error):
        connection.set_vring(Message.SET_VRING_NUM, 0, 3)
    connection.tell(Message.SET_OWNER)
    connection.close()


def test_who_cannot_be_let_in_now_is_later(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("web", pools, SIZE, disk, "8M", clients="any"), door="vhost")
    unused = next(fd for fd in range(1024) if not Path(f"/proc/{server.pid}/fd/{fd}").is_symlink())
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (unused, before[1]))
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(str(server.vhost))  # whose descriptor was set aside when the door began to wait
        wait_until(lambda: "could not be let in" in server.log(), "the log to say so")
        second.connect(str(server.vhost))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
        assert Connection(second, 10).get(Message.GET_FEATURES)
    assert server.log().count("could not be let in") < 10  # it does not try all the time
