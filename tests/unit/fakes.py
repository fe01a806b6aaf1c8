"""Pool files made by hand, and a tmemd in a process of its own."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmemd import poolfile, protocol
from tmemd.client import Client
from tmemd.poolfile import Counters, Identity

MIB = 1 << 20
LIMIT = 256 * MIB
MINIMUM = MIB


def identity(name: str, size: int = 64 * MIB, *, has_file: bool = True) -> Identity:
    """An identity as the core would lay it out: states, then the index, then memory for twice the device."""
    blocks = -(-size // (2 * MIB))
    index = -(-(poolfile.STATES_OFFSET + blocks) // 4096) * 4096
    data = -(-(index + blocks * 4096) // (256 * 1024)) * 256 * 1024
    return Identity(name, size, index, data, -(-2 * size // MIB) * MIB, uuid.uuid4(), uuid.uuid4(), 1, has_file)


def counters(**values: int) -> Counters:
    """Counters, all 0 but the limits and those given."""
    all_values = dict.fromkeys(Counters.__struct_fields__, 0) | {"limit_bytes": LIMIT, "minimum_bytes": MINIMUM}
    return Counters(**(all_values | values))


def write_counters(fd: int, values: Counters) -> None:
    words = [getattr(values, field) for field in Counters.__struct_fields__]
    os.pwrite(fd, struct.pack(f"<{len(words)}Q", *words), poolfile.COUNTERS_OFFSET)


def finish_pool(fd: int, name: str, size: int = 64 * MIB, *, has_file: bool = True, **values: int) -> Identity:
    """What a plugin does with the empty file it is given."""
    made = identity(name, size, has_file=has_file)
    os.ftruncate(fd, made.file_bytes)
    write_counters(fd, counters(**values))
    os.pwrite(fd, made.pack(), 0)
    return made


@contextmanager
def pool(directory: Path, name: str, size: int = 64 * MIB, *, has_file: bool = True, **values: int) -> Iterator[int]:
    """A pool file in *directory*; yields it open."""
    fd = os.open(directory / f"{name}.pool", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        finish_pool(fd, name, size, has_file=has_file, **values)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def on_tmpfs() -> Iterator[Path]:
    """A directory on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tmemd-test-") as name:
        # Other users' plugins must be able to reach what lies in it.
        Path(name).chmod(0o755)
        yield Path(name)


@dataclass
class Tmemd:
    """A tmemd that runs."""

    process: subprocess.Popen[str]
    directory: Path
    socket: Path

    @property
    def client(self) -> Client:
        return Client.of_daemon(self.socket)

    def attach(self, name: str, size: int = 64 * MIB, limit: int | None = LIMIT) -> protocol.Attach:
        return protocol.Attach(name, size, True, limit)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def tmemd(base: Path, *options: str) -> Iterator[Tmemd]:
    """Run tmemd on base/pools, ready when this returns; stops it if the test did not."""
    pools = base / "pools"
    pools.mkdir(exist_ok=True)
    socket = base / "socket"
    command = [sys.executable, "-m", "tmemd.daemon", f"--socket={socket}", f"--pools={pools}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            running = Tmemd(process, pools, socket)
            _wait_until_ready(running)
            yield running
        finally:
            process.kill()


def _wait_until_ready(running: Tmemd) -> None:
    assert running.process.stderr
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        line = running.process.stderr.readline()
        if "listening on" in line:
            return
        if not line:
            break
    raise RuntimeError("tmemd did not start")
