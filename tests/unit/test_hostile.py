# SPDX-License-Identifier: BSD-3-Clause
"""Whatever comes over the control socket: clear errors, nothing changes, and good clients are answered."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import threading
import typing
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.support import fakes
from tests.support.harness import wait_until
from tmemd import protocol
from tmemd.store.poolfile import PoolError

MIB = fakes.MIB
LONG_ANSWERS = 256  # pools; a long list of them is a megabyte, more than a socket takes
TIMEOUT = 1.0

VALID: list[protocol.Request] = [
    protocol.Attach("web", 64 * MIB, True, 4 * MIB),
    protocol.List(long=True),
    protocol.Show("web", long=True),
    protocol.Set(name="web", target=2 * MIB, weight=7, cap=8 * MIB, minimum=MIB, compression=False),
    protocol.Freeze("web", True),
    protocol.Freeze(None, True),
    protocol.Ask("web", "demote", MIB, 3, True),
    protocol.Destroy("web", True),
    protocol.Rename("web", "other"),
    protocol.Host(),
    protocol.Events(0),
]


def test_every_kind_of_request_is_tried() -> None:
    assert {type(request) for request in VALID} == set(typing.get_args(protocol.Request))


@dataclass
class Victim:
    """A tmemd with pools whose control pages and settings nobody may change."""

    running: fakes.Tmemd
    base: Path

    def state(self) -> list[tuple[str, bytes]]:
        """All that a request could change."""
        kept = [(name, (self.base / name).read_bytes()) for name in ("state",) if (self.base / name).exists()]
        for path in sorted(self.running.directory.iterdir()):
            with path.open("rb") as file:
                kept.append((path.name, file.read(16384)))
        return kept

    def ask(self, data: bytes) -> bytes:
        """What comes back for these bytes."""
        with self.connection() as sock:
            with suppress(BrokenPipeError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            return received(sock)

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.running.socket))
            sock.settimeout(30)
            yield sock

    def open_files(self) -> int:
        return psutil.Process(self.running.process.pid).num_fds()

    def memory(self) -> int:
        """Bytes of its RAM."""
        return int(psutil.Process(self.running.process.pid).memory_info().rss)


def received(sock: socket.socket) -> bytes:
    """All until the other side hangs up, as it may do before it has read all of ours."""
    answer = bytearray()
    with suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            answer += chunk
    return bytes(answer)


@contextmanager
def unchanged(victim: Victim) -> Iterator[None]:
    """Whatever is done inside changes nothing, and a good client is answered afterwards."""
    before = victim.state()
    yield
    assert victim.state() == before
    assert [status.name for status in victim.running.client.pools()] == ["db", "web"]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    options = (f"--timeout={TIMEOUT}", "--allow-user=nobody", "--group=65534")
    with fakes.on_tmpfs() as base, fakes.tmemd(base, *options) as running:
        # Its messages are many; unread they would make it wait.
        threading.Thread(target=deque, args=(running.process.stderr, 0), daemon=True).start()
        with fakes.pool(running.directory, "web"), fakes.pool(running.directory, "db"):
            assert len(running.client.pools()) == 2
            yield Victim(running, base)


VALUES = [
    "-1", "0", "1", "255", "4096", "1e3", "1.5", "-0", "1e999", "-1e999", "NaN", "Infinity", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "-9223372036854775809", "9" * 400, "0x10", "01", "null", "true",
    "false", "[]", "{}", '["web"]', '{"name":"web"}', '""', '"web"', '"../db"', '"web\\u0000"', '"\\ud800"',
    '"\\u202e"', '"' + "w" * 63 + '"', '"' + "w" * 64 + '"', '"drain"', '"list"', '"destroy"', '"', "[" * 900, "\x00",
]  # fmt: skip


def members(request: protocol.Request) -> list[tuple[str, str]]:
    """Keys and values of the request's JSON, values as text."""
    return [(key, json.dumps(value)) for key, value in json.loads(protocol.encode(request)).items()]


def frame(fields: list[tuple[str, str]]) -> bytes:
    body = ",".join(f"{json.dumps(key)}:{value}" for key, value in fields)
    return ("{" + body + "}\n").encode("utf-8", "surrogatepass")


@st.composite
def mutated_fields(draw: st.DrawFn) -> bytes:
    """A valid request with members replaced, removed, doubled, added or swapped for another request's."""
    fields = members(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(fields) - 1)) if fields else 0
        value = draw(st.sampled_from(VALUES))
        match draw(st.sampled_from(["replace", "remove", "double", "add", "wrap", "graft"])):
            case "replace" if fields:
                fields[at] = fields[at][0], value
            case "remove" if fields:
                del fields[at]
            case "double" if fields:
                fields.insert(draw(st.integers(0, len(fields))), (fields[at][0], value))
            case "wrap" if fields:
                depth = draw(st.sampled_from([1, 2, 500]))
                fields[at] = fields[at][0], "[" * depth + fields[at][1] + "]" * depth
            case "graft":
                fields.append(draw(st.sampled_from(members(draw(st.sampled_from(VALID))))))
            case _:
                fields.append((draw(st.sampled_from(["uid", "nbytes", "Name", "", "limit", "type"])), value))
    return frame(fields)


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """The bytes of a valid request, some changed, removed, doubled or put in."""
    data = bytearray(protocol.encode(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 8))
        data[start:end] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[start:end] * 2))))
    return bytes(data)


def is_valid(data: bytes) -> bool:
    if data.count(b"\n") != 1 or not data.endswith(b"\n"):
        return False
    try:
        protocol.decode_request(data)
    except PoolError:
        return False
    return True


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b'{"type":"freeze","name":"web","name":"db","frozen":true}\n')
@example(b'{"type":"freeze","name":"web","frozen":false,"frozen":true}\n')
@example(b'{"type":"list","type":"destroy","name":"web","lose_pages":true}\n')
@example(protocol.encode(VALID[4]).strip() * 2 + b"\n")
@example(protocol.encode(VALID[4]) * 2)
@example(protocol.encode(VALID[4]) + b"\0")
@example(b"\xff\xfe" + protocol.encode(VALID[4]))
@example(b"\xef\xbb\xbf" + protocol.encode(VALID[4]))
@example(protocol.encode(VALID[4]).replace(b"}", b"}" + b" " * protocol.MAX_REQUEST * 3))
@example(b"x" * (1 << 20))
@example(b'{"type":"destroy","\\name":"web","lose_pages":true}\n')
@given(data=st.one_of(mutated_fields(), mutated_bytes()))
def test_mutated_requests_change_nothing(victim: Victim, data: bytes) -> None:
    assume(not is_valid(data))
    with unchanged(victim):
        answer = victim.ask(data)
        if b"\n" not in data and len(data) <= protocol.MAX_REQUEST:
            assert answer == b""  # we hung up before the end of the line
            return
        failed = protocol.decode_answer(answer)
        assert isinstance(failed, protocol.Failed)
        assert failed.error
        assert "\n" not in failed.error
        assert len(failed.error) < protocol.MAX_REQUEST


def test_half_messages_change_nothing(victim: Victim) -> None:
    with unchanged(victim):
        for request in VALID:
            data = protocol.encode(request)
            for length in range(len(data)):
                with victim.connection() as sock:
                    sock.sendall(data[:length])
    wait_until(lambda: victim.open_files() < 20, "connections to be closed")


def test_bytes_may_come_one_at_a_time(victim: Victim) -> None:
    with unchanged(victim), victim.connection() as sock:
        for byte in protocol.encode(protocol.Show("web")):
            sock.sendall(bytes([byte]))
        answer = protocol.decode_answer(received(sock))
        assert isinstance(answer, protocol.Listed)


def test_peers_may_hang_up_at_any_byte_of_the_answer(victim: Victim) -> None:
    with unchanged(victim):
        size = len(victim.ask(protocol.encode(protocol.List(long=True))))
        for length in range(0, size, max(size // 50, 1)):
            with victim.connection() as sock:
                sock.sendall(protocol.encode(protocol.List(long=True)))
                sock.recv(length or 1, socket.MSG_WAITALL)
    wait_until(lambda: victim.open_files() < 20, "connections to be closed")


def test_descriptors_that_are_sent_are_not_kept(victim: Victim) -> None:
    before = victim.open_files()
    with unchanged(victim):
        for request in VALID:
            for at in (0, 5):
                data = protocol.encode(request)[:-2] + b"\n"
                with victim.connection() as sock:
                    sock.sendall(data[:at])
                    fds = array.array("i", [0] * 200)
                    sock.sendmsg([data[at:]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                    assert isinstance(protocol.decode_answer(received(sock)), protocol.Failed)
    wait_until(lambda: victim.open_files() <= before, "descriptors to be closed")


@contextmanager
def who_never_read(victim: Victim, n: int) -> Iterator[None]:
    """So many peers that ask for much and take nothing of it."""
    with ExitStack() as stack:
        for _ in range(n):
            sock = stack.enter_context(victim.connection())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(protocol.encode(protocol.List(long=True)))
        yield


def test_peers_that_never_read_delay_nobody_and_cost_no_memory(victim: Victim) -> None:
    with ExitStack() as stack:
        for n in range(LONG_ANSWERS):
            stack.enter_context(fakes.pool(victim.running.directory, f"p{n}"))
        sizes = []
        for _ in range(3):
            with who_never_read(victim, 24):
                assert len(victim.running.client.pools()) == LONG_ANSWERS + 2
                wait_until(lambda: victim.open_files() < LONG_ANSWERS + 20, "silent peers to be cut off")
            sizes.append(victim.memory())
        assert sizes[-1] < sizes[1] + 8 * MIB, sizes
        for n in range(LONG_ANSWERS):
            (victim.running.directory / f"p{n}.pool").unlink()
    wait_until(lambda: victim.open_files() < 20, "removed pools to be let go of")


AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
"""

FLOOD = (
    AS_NOBODY
    + """
print("ready", flush=True)
held = []
while os.getppid() == int(sys.argv[2]):
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(sys.argv[1])
        sock.send(b'{"type":"list"')
    except OSError:
        pass
    held.append(sock)
    if len(held) > int(sys.argv[3]):
        held.pop(0).close()
"""
)

ASK = (
    AS_NOBODY
    + """
for line in sys.stdin.buffer:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        sock.sendall(line)
        sys.stdout.buffer.write(b"".join(iter(lambda: sock.recv(65536), b"")))
"""
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@needs_root
@pytest.mark.parametrize("held", [0, 800])
def test_a_flood_of_another_user_does_not_lock_root_out(victim: Victim, held: int) -> None:
    """Of connections that end at once, and of connections that stay."""
    command = [sys.executable, "-c", FLOOD, str(victim.running.socket), str(os.getpid()), str(held)]
    with unchanged(victim), ExitStack() as stack:
        for _ in range(3):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout
            assert process.stdout.readline()
        for _ in range(20):
            assert len(victim.running.client.pools()) == 2
    wait_until(lambda: victim.open_files() < 20, "connections to be closed")


@needs_root
def test_another_user_changes_nothing_with_any_request(victim: Victim) -> None:
    with unchanged(victim):
        lines = b"".join(map(protocol.encode, VALID))
        command = [sys.executable, "-c", ASK, str(victim.running.socket)]
        done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, check=True, timeout=60)
        answers = [protocol.decode_answer(line) for line in done.stdout.splitlines()]
    for request, answer in zip(VALID, answers, strict=True):
        match request:
            case protocol.List():
                assert answer == protocol.Listed([])
            case protocol.Events():
                assert isinstance(answer, protocol.Happened)
                assert answer.events == []
            case protocol.Host():
                assert isinstance(answer, protocol.HostStatus | protocol.Failed)
            case _:
                assert isinstance(answer, protocol.Failed)
