# SPDX-License-Identifier: BSD-3-Clause
"""One client at a time, and who is one, by a /proc made by hand."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from tests.support.harness import DEADLINE
from tmemd.device.clients import EVERYBODY, Clients, InUseError
from tmemd.system import peer
from tmemd.system.peer import Peer

A, B = Peer("a", "client a"), Peer("b", "client b")
UNKNOWN = Peer(None, "nobody knows")


def test_several_connections_of_one_client_are_one() -> None:
    clients = Clients()
    for _ in range(3):
        clients.enter(A, 0)
    for _ in range(2):
        clients.leave()
        with pytest.raises(InUseError, match="client a"):
            clients.enter(B, 0)
    clients.leave()
    clients.enter(B, 0)
    with pytest.raises(InUseError, match="client b"):
        clients.enter(A, 0)


def test_who_cannot_be_told_from_others_is_alone() -> None:
    clients = Clients()
    clients.enter(UNKNOWN, 0)
    with pytest.raises(InUseError, match="nobody knows"):
        clients.enter(UNKNOWN, 0)


def test_those_that_may_share_do() -> None:
    clients = Clients()
    for _ in range(3):
        clients.enter(EVERYBODY, 0)


def test_who_waits_enters_when_the_other_has_left() -> None:
    clients = Clients()
    clients.enter(A)
    entering = threading.Thread(target=clients.enter, args=(B, threading.TIMEOUT_MAX), daemon=True)
    entering.start()
    clients.leave()
    entering.join(DEADLINE)
    assert not entering.is_alive()
    with pytest.raises(InUseError, match="client b"):
        clients.enter(A, 0)


def stat(start: int, command: str = "qemu-system-x86") -> str:
    fields = ["S", *map(str, range(4, 22)), str(start), "0", "0"]
    return f"17 ({command}) {' '.join(fields)}\n"


def process(root: Path, pid: int, start: int, *inodes: int, command: str = "qemu-system-x86") -> None:
    descriptors = root / f"proc/{pid}/fd"
    descriptors.mkdir(parents=True)
    (root / f"proc/{pid}/stat").write_text(stat(start, command))
    for number, inode in enumerate(inodes):
        (descriptors / str(number)).symlink_to(f"socket:[{inode}]")


def test_a_process_is_its_number_and_its_start(tmp_path: Path) -> None:
    process(tmp_path, 17, 1000)
    first = peer.of_process(17, tmp_path)
    assert first.name == "process 17 (qemu-system-x86)"
    assert first.is_same(peer.of_process(17, tmp_path))
    (tmp_path / "proc/17/stat").write_text(stat(2000))
    assert not first.is_same(peer.of_process(17, tmp_path)), "another with the same number"


@pytest.mark.parametrize(("command", "name"), [("a) S (b", "a) S (b"), ("\x1b[2J", "'\\x1b[2J'")])
def test_a_process_calls_itself_what_it_likes(tmp_path: Path, command: str, name: str) -> None:
    process(tmp_path, 17, 1000, command=command)
    assert peer.of_process(17, tmp_path) == Peer(("process", 17, "1000"), f"process 17 ({name})")


def test_a_process_that_we_may_not_look_at_is_its_number(tmp_path: Path) -> None:
    assert peer.of_process(17, tmp_path) == Peer(("process", 17, ""), "process 17")
    assert not peer.of_process(0, tmp_path).is_same(peer.of_process(0, tmp_path))


def ipv4(address: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(address) + bytes(8)


def ipv6(address: str, port: int) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + bytes(4)


def tables(root: Path, *, tcp: str = "", tcp6: str = "") -> None:
    (root / "proc/net").mkdir(parents=True, exist_ok=True)
    (root / "proc/net/tcp").write_text(f"  sl  local_address\n{tcp}")
    (root / "proc/net/tcp6").write_text(f"  sl  local_address\n{tcp6}")


def connected(end: str, inode: int, state: str = "01") -> str:
    return f"   0: {end} 0100007F:2A39 {state} 00000000:00000000 00:00000000 00000000  1000 0 {inode} 1 0\n"


def test_another_machine_is_its_address(tmp_path: Path) -> None:
    tables(tmp_path)
    one = peer.of_address(ipv4("192.0.2.1", 1000), tmp_path)
    assert one.name == "192.0.2.1"
    assert one.is_same(peer.of_address(ipv4("192.0.2.1", 2000), tmp_path))
    assert one.is_same(peer.of_address(ipv6("::ffff:192.0.2.1", 2000), tmp_path))
    assert not one.is_same(peer.of_address(ipv4("192.0.2.2", 1000), tmp_path))
    assert not one.is_same(peer.of_address(ipv6("2001:db8::1", 1000), tmp_path))


@pytest.mark.skipif(sys.byteorder != "little", reason="the kernel's tables are in its own byte order")
@pytest.mark.parametrize(
    ("sockaddr", "table", "end"),
    [
        (ipv4("127.0.0.1", 8080), "tcp", "0100007F:1F90"),
        (ipv4("192.168.1.5", 8080), "tcp", "0501A8C0:1F90"),
        (ipv4("127.0.0.1", 8080), "tcp6", "0000000000000000FFFF00000100007F:1F90"),
        (ipv6("::1", 8080), "tcp6", "00000000000000000000000001000000:1F90"),
    ],
)
def test_one_of_this_machine_is_the_process_at_the_other_end(
    tmp_path: Path, sockaddr: bytes, table: str, end: str
) -> None:
    tables(tmp_path, **{table: connected(end, 5) + connected(end, 6, state="0A")})
    process(tmp_path, 17, 1000, 5)
    process(tmp_path, 18, 1000, 6)
    assert peer.of_address(sockaddr, tmp_path) == peer.of_process(17, tmp_path)


def test_local_ones_whose_process_is_hidden_or_several_are_alone(tmp_path: Path) -> None:
    for holders in ([], [17, 18]):
        for pid in holders:
            process(tmp_path, pid, 1000, 5)
        tables(tmp_path, tcp=connected("0100007F:1F90", 5))
        assert peer.of_address(ipv4("127.0.0.1", 8080), tmp_path) == Peer(None, "port 8080 of 127.0.0.1")
    tables(tmp_path)
    assert peer.of_address(ipv4("127.0.0.1", 8080), tmp_path).identity is None, "its end is closed already"


def test_what_is_no_address_is_nobody(tmp_path: Path) -> None:
    for sockaddr in (bytes(128), struct.pack("=HHII", 40, 0, 1, 3)):  # nothing, and a vsock
        assert peer.of_address(sockaddr, tmp_path).identity is None
