# SPDX-License-Identifier: BSD-3-Clause
"""Pool files made by hand, and a tmemd in a process of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import lz4.block
import msgspec

from tests.support import leftovers
from tmemd import protocol
from tmemd.client import Client
from tmemd.store import poolfile
from tmemd.store.poolfile import Counters, Identity

MIB = 1 << 20
LIMIT = 256 * MIB
MINIMUM = MIB


def identity(name: str, size: int = 64 * MIB, *, has_file: bool = True, ephemeral: bool = False) -> Identity:
    """An identity as the core would lay it out: states, then the index, then memory for twice the device."""
    blocks = -(-size // (2 * MIB))
    index = -(-(poolfile.STATES_OFFSET + blocks) // 4096) * 4096
    data = -(-(index + blocks * 4096) // (256 * 1024)) * 256 * 1024
    made = Identity(name, size, index, data, -(-2 * size // MIB) * MIB, uuid.uuid4(), uuid.uuid4(), 1, has_file)
    return replace(made, is_ephemeral=True, backing="/images/golden") if ephemeral else made


def counters(**values: int) -> Counters:
    """Counters, all 0 but the limits and those given."""
    all_values = dict.fromkeys(Counters.__struct_fields__, 0) | {"limit_bytes": LIMIT, "minimum_bytes": MINIMUM}
    return Counters(**(all_values | values))


def write_counters(fd: int, values: Counters) -> None:
    words = [getattr(values, field) for field in Counters.__struct_fields__]
    os.pwrite(fd, struct.pack(f"<{len(words)}Q", *words), poolfile.COUNTERS_OFFSET)


def write_latencies(fd: int, **operations: poolfile.Histogram) -> None:
    """The histograms of some operations ('put', 'get', 'spill', 'file_read'); the others stay."""
    for number, operation in enumerate(poolfile.Latencies.__struct_fields__):
        if histogram := operations.get(operation):
            words = (histogram.sum_ns, *histogram.counts)
            os.pwrite(fd, struct.pack(f"<{len(words)}Q", *words), poolfile.STATISTICS_OFFSET + number * len(words) * 8)


def write_ages(fd: int, ages: poolfile.Ages) -> None:
    """All that is known by age."""
    *tables, published, generation = msgspec.structs.astuple(ages)
    words = [word for table in tables for word in table] + [published, generation]
    place = poolfile.STATISTICS_OFFSET + len(poolfile.Latencies.__struct_fields__) * (1 + poolfile.LATENCIES) * 8
    os.pwrite(fd, struct.pack(f"<{len(words)}Q", *words), place)


def histogram(*buckets: int, count: int = 1, sum_ns: int = 0) -> poolfile.Histogram:
    """*count* operations in each of these buckets."""
    counts = tuple(count * buckets.count(number) for number in range(poolfile.LATENCIES))
    return poolfile.Histogram(sum_ns, counts)


def finish_pool(
    fd: int, name: str, size: int = 64 * MIB, *, has_file: bool = True, ephemeral: bool = False, **values: int
) -> Identity:
    """What a plugin does with the empty file it is given."""
    made = identity(name, size, has_file=has_file, ephemeral=ephemeral)
    os.ftruncate(fd, made.file_bytes)
    write_counters(fd, counters(**values))
    os.pwrite(fd, made.pack(), 0)
    return made


@contextmanager
def pool(
    directory: Path, name: str, size: int = 64 * MIB, *, has_file: bool = True, ephemeral: bool = False, **values: int
) -> Iterator[int]:
    """A pool file in *directory*; yields it open."""
    fd = os.open(directory / f"{name}.pool", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        finish_pool(fd, name, size, has_file=has_file, ephemeral=ephemeral, **values)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def leased(fd: int) -> Iterator[None]:
    """A lease on the file, with which its owner keeps others from opening it without waiting."""
    ignored = signal.signal(signal.SIGIO, signal.SIG_IGN)  # what the holder of a broken lease is sent
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        signal.signal(signal.SIGIO, ignored)


@contextmanager
def on_tmpfs() -> Iterator[Path]:
    """A directory on tmpfs."""
    with leftovers.directory("/dev/shm") as path:
        path.chmod(0o755)  # other users' plugins must be able to reach what lies in it
        free = path / "base"  # the other is locked
        free.mkdir()
        yield free


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


# What else runs on the machine does not change what pools get.
STEADY = """
[budget]
minimum = "50%"
maximum = "50%"
"""


def start_tmemd(base: Path, *options: str, config: str = STEADY, wrapper: Sequence[str] = ()) -> Tmemd:
    """Run tmemd on base/pools, base/socket and base/state, and return when it listens; stopping it is the caller's.

    *wrapper* is a command that executes its arguments in its place.
    """
    directory, socket = base / "pools", base / "socket"
    directory.mkdir(exist_ok=True)
    where = [f"--socket={socket}", f"--pools={directory}", f"--state={base}/state"]
    if not any(option.startswith("--config") for option in options):
        (base / "tmemd.toml").write_text(config)
        where.append(f"--config={base}/tmemd.toml")
    command = [*wrapper, sys.executable, "-m", "tmemd.daemon", *where, *options]
    process = subprocess.Popen(leftovers.dying_with_us(command), stderr=subprocess.PIPE, text=True)
    assert process.stderr
    lines = []
    while line := process.stderr.readline():
        if "listening on" in line:
            return Tmemd(process, directory, socket)
        lines.append(line)
    process.wait()
    raise RuntimeError("tmemd did not start: " + "".join(lines))


@contextmanager
def tmemd(base: Path, *options: str, config: str = STEADY, wrapper: Sequence[str] = ()) -> Iterator[Tmemd]:
    """The same for the length of a with block."""
    running = start_tmemd(base, *options, config=config, wrapper=wrapper)
    with running.process:
        try:
            yield running
        finally:
            running.process.kill()


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Not by the library the verifier uses, so that its use is checked as well."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


RAW, LZ4, SAME = range(3)


class Filler:
    """Fills a pool file as docs/pool-format.md says, one page at a time."""

    def __init__(self, fd: int, made: Identity) -> None:
        self.fd = fd
        self.identity = made
        self.in_tmem = self.payload_bytes = 0
        self._free: dict[int, int] = {}  # slot size to the next free location
        self._spans = 0

    def slot(self, size: int) -> int:
        """The location of a new slot."""
        span = 256 * 1024
        if size not in self._free or self._free[size] % span + size > span:
            self._free[size] = self._spans * span
            self._spans += 1
        location = self._free[size]
        self._free[size] += size
        if self._free[size] % span == 0:
            del self._free[size]
        return location

    def put(self, page: int, content: bytes) -> int:
        """Store a page; returns where its record lies in the file."""
        if content == content[:8] * 512:
            encoding, payload = SAME, content[:8]
        else:
            encoding, payload = LZ4, lz4.block.compress(content, store_size=False)
            if len(payload) > 4000:
                encoding, payload = RAW, content
        return self.put_record(page, encoding, payload)

    def put_record(self, page: int, encoding: int, payload: bytes) -> int:
        """Store a record and the word that leads to it."""
        location = self.slot(max(32, -(-(12 + len(payload)) // 16) * 16))
        sealed = struct.pack("<IHH", page, len(payload), encoding) + payload
        record = struct.pack("<IIHH", page, crc32c(sealed), len(payload), encoding) + payload
        os.pwrite(self.fd, record, self.identity.data_offset + location)
        self.word(page, location // 16 << 28 | len(payload) << 12 | 5 << 8 | encoding << 3 | 1)
        self.in_tmem += 1
        self.payload_bytes += len(payload)
        return self.identity.data_offset + location

    def word(self, page: int, value: int) -> None:
        """Set an index word."""
        os.pwrite(self.fd, struct.pack("<Q", value), self.identity.index_offset + page * 8)

    def read_word(self, page: int) -> int:
        """An index word."""
        return int.from_bytes(os.pread(self.fd, 8, self.identity.index_offset + page * 8), "little")

    def state(self, block: int, value: int) -> None:
        """Set a block's state."""
        os.pwrite(self.fd, bytes([value]), poolfile.STATES_OFFSET + block)

    def finish(self, **values: int) -> None:
        """Write the counters."""
        counted = {"pages_in_tmem": self.in_tmem, "payload_bytes": self.payload_bytes, "used_bytes": LIMIT}
        write_counters(self.fd, counters(**(counted | values)))


@contextmanager
def filled(
    directory: Path, name: str = "web", size: int = 64 * MIB, *, has_file: bool = True, ephemeral: bool = False
) -> Iterator[Filler]:
    """A finished pool to fill."""
    with pool(directory, name, size, has_file=has_file, ephemeral=ephemeral) as fd:
        made = poolfile.read_identity(fd, name)
        assert made
        yield Filler(fd, made)
