# SPDX-License-Identifier: BSD-3-Clause
"""The servers that are compared, and the load put on them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
THREADS: Final = 16
PATIENCE: Final = 30.0  # seconds for a server to listen
OURS: Final = "tmem"
BASE: Final = "null"
BEFORE: Final = "tmem before"


@dataclass(frozen=True)
class Peer:
    """A server: what nbdkit is asked to serve, and whether it keeps what is written."""

    name: str
    plugin: list[str]
    keeps: bool = True
    bin: Path = Path(sys.executable).parent  # of the environment that its Python plugin is installed in


@dataclass(frozen=True)
class Place:
    """What a measurement works with: the loader, real pages, and directories on disk and in tmpfs of its own."""

    loader: Path
    corpus: Path
    disk: Path
    pools: Path


def ours(place: Place, size: int, tree: Path = ROOT, name: str = OURS) -> Peer:
    """The device of a checkout of tmemd, of *size* bytes, with room for every page."""
    backing = place.disk / f"{name}.backing"
    plugin = [str(tree / "plugin" / "tmem.py"), f"name={name.replace(' ', '-')}", f"size={size}", f"backing={backing}"]
    # A loader stays connected while fio has its turn.
    command = ["python", *plugin, f"limit={2 * size}", f"pools={place.pools}", "clients=any"]
    return Peer(name, command, bin=Path(sys.executable).parent if tree == ROOT else tree / ".venv" / "bin")


def all_peers(place: Place, size: int, against: Path | None = None) -> list[Peer]:
    """Our device, that of another checkout, and nbdkit's own plugins, all of *size* bytes."""
    plain = place.disk / "file"
    with plain.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return [
        Peer(BASE, ["null", str(size)], keeps=False),
        ours(place, size),
        *([ours(place, size, against, BEFORE)] if against else []),
        Peer("memory", ["memory", str(size)]),
        Peer("memory zstd", ["memory", str(size), "allocator=zstd"]),
        Peer("file", ["file", str(plain)]),
    ]


class Server:
    """A running nbdkit."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        """Serve what *process* serves on *socket*."""
        self.socket = socket
        self.process = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def serving(peer: Peer, place: Place) -> Iterator[Server]:
    """Run nbdkit for a peer; it ends with the context, or with this process."""
    socket = place.disk / f"{peer.name.replace(' ', '-')}.sock"
    command = ["nbdkit", "--exit-with-parent", "--threads", str(THREADS), "-U", str(socket), *peer.plugin]
    environment = os.environ | {"PATH": f"{peer.bin}:{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            wait_for(socket, process)
            yield Server(process, socket)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            socket.unlink(missing_ok=True)


def wait_for(socket: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + PATIENCE
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{socket.stem} did not start")
        time.sleep(0.05)


class Loader:
    """The C loader, connected to one server; it waits without using CPU between commands."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Talk to a loader that runs as *process*."""
        self._process = process

    def __call__(self, op: str, depth: int, argument: object = "") -> dict[str, Any]:
        """Run one command (see loader.c) and return its report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{op} {depth} {argument}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the loader failed at '{op}'; its own message is above")
        report: dict[str, Any] = json.loads(answer)
        return report


@contextlib.contextmanager
def loading(server: Server, place: Place) -> Iterator[Loader]:
    """Connect a loader to a server."""
    command = [str(place.loader), str(server.socket), str(place.corpus)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield Loader(process)
        finally:
            process.kill()


def fio(server: Server, op: str, depth: int, seconds: float) -> dict[str, float]:
    """Random reads or writes by fio; its buffers are synthetic and compress far too easily to say much about writes."""
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={server.socket}", f"--rw=rand{op}",
        "--bs=4k", f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--refill_buffers",
        "--buffer_compress_percentage=65", "--randrepeat=0", "--output-format=json",
    ]  # fmt: skip
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    report = json.loads(output[output.index("{") :])["jobs"][0][op]
    return {"iops": report["iops"], "p99_us": report["clat_ns"]["percentile"]["99.000000"] / 1000}
