# SPDX-License-Identifier: BSD-3-Clause
"""Measure what one nbdkit with many exports takes beside its pools: memory under load and idle, CPU while idle.

Memory is the Rss of every mapping of nbdkit (/proc/PID/smaps) but those of the pool files, whose pages are the guests'.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import nbd
import psutil

from tests.support import leftovers
from tests.support.content import PAGE, content
from tests.support.harness import MIB, ROOT

PATIENCE: Final = 60.0  # seconds for the server to start
SAMPLE_INTERVAL: Final = 0.2  # seconds between two looks at smaps
UNTIL_IDLE: Final = 4.0  # seconds until devices have compacted and counted what the load left, and rest


def memory(pid: int, pools: Path) -> dict[str, int]:
    """Rss of a process in bytes by kind of mapping; heaps, stacks and the like are `anonymous`."""
    kinds = dict.fromkeys(("anonymous", "files", "pools"), 0)
    kind = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            path = words[5] if len(words) > 5 else ""
            kind = "pools" if path.startswith(f"{pools}/") else "files" if path.startswith("/") else "anonymous"
        elif words[0] == "Rss:":
            kinds[kind] += int(words[1]) << 10
    return kinds


def beside_pools(kinds: dict[str, int]) -> int:
    """What of `memory`'s answer is not the pools'."""
    return kinds["anonymous"] + kinds["files"]


class Server:
    """One nbdkit with an export for each name."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, pools: Path) -> None:
        """Speak of *process*, which listens on *socket* and has its pools in *pools*."""
        self.socket = socket
        self.pools = pools
        self.pid = process.pid

    def memory(self) -> dict[str, int]:
        """Its memory now; see `memory`."""
        return memory(self.pid, self.pools)

    def idle_cpu(self, seconds: float) -> float:
        """The share of one processor it takes in *seconds*, once its devices are idle."""
        time.sleep(UNTIL_IDLE)
        process = psutil.Process(self.pid)
        before = process.cpu_times()
        time.sleep(seconds)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / seconds


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file is there. Raises RuntimeError when the process ends before, or never makes it."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the server did not start")
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    directory: Path,
    pools: Path,
    names: Sequence[str],
    size: int,
    *,
    options: Sequence[str] = (),
    wrapper: Sequence[str] = (),
) -> Iterator[Server]:
    """Run scripts/serve with a device of *size* bytes for each name, each with room for all its pages.

    *wrapper* is a command that executes its arguments in its place.
    """
    keys = [
        f"{key}={value}"
        for name in names
        for key, value in {
            "name": name,
            "size": size,
            "limit": 2 * size,
            "backing": directory / f"{name}.backing",
            "pools": pools,
            "reserve": "no",
        }.items()
    ]
    socket, pidfile = directory / "socket", directory / "pid"
    command = [*wrapper, ROOT / "scripts" / "serve", "--socket", socket, "--pid-file", pidfile, *options, *keys]
    with subprocess.Popen([str(word) for word in command], start_new_session=True) as process:
        try:
            wait_for(pidfile, process)
            yield Server(process, socket, pools)
        finally:
            process.kill()


class Client:
    """One connection that keeps random 4 KiB reads and writes in flight and checks what it reads."""

    def __init__(self, socket: Path, name: str, pages: int, depth: int) -> None:
        """Connect to export *name* of *pages* pages."""
        self.done = 0
        self._handle = nbd.NBD()
        self._handle.set_export_name(name)
        self._handle.connect_unix(str(socket))
        self._versions = [0] * pages
        self._busy: set[int] = set()
        self._depth = depth
        self._random = random.Random(name)

    def fileno(self) -> int:
        """The connection's descriptor, for poll."""
        return int(self._handle.aio_get_fd())

    def fill(self) -> None:
        """Have as many requests under way as the depth says, half of them writes."""
        while len(self._busy) < self._depth:
            page = self._random.randrange(len(self._versions))
            if page not in self._busy:
                self._busy.add(page)
                (self._write if self._random.random() < 0.5 else self._read)(page)

    def _write(self, page: int) -> None:
        self._versions[page] += 1
        data = nbd.Buffer.from_bytearray(bytearray(content(page, self._versions[page])))
        self._handle.aio_pwrite(data, page * PAGE, self._completion(page, lambda: None))

    def _read(self, page: int) -> None:
        buffer = nbd.Buffer(PAGE)

        def check() -> None:
            if buffer.to_bytearray() != content(page, self._versions[page]):
                raise RuntimeError(f"page {page} came back wrong")

        self._handle.aio_pread(buffer, page * PAGE, self._completion(page, check))

    def _completion(self, page: int, check: Callable[[], None]) -> Callable[[Any], int]:
        def completed(error: Any) -> int:
            if error.value:
                raise RuntimeError(f"page {page}: {os.strerror(error.value)}")
            check()
            self._busy.discard(page)
            self.done += 1
            return 1

        return completed

    def step(self, events: int) -> None:
        """Let libnbd do what *events* of poll allow."""
        direction = self._handle.aio_get_direction()
        if events & select.POLLIN and direction & nbd.AIO_DIRECTION_READ:
            self._handle.aio_notify_read()
        elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
            self._handle.aio_notify_write()

    def wanted(self) -> int:
        """The events to poll for."""
        direction = self._handle.aio_get_direction()
        reading = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        return reading | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)

    def finish(self) -> None:
        """Wait for what is in flight."""
        while self._handle.aio_in_flight():
            self._handle.poll(-1)

    def close(self) -> None:
        """Disconnect."""
        self._handle.shutdown()


def load(clients: Sequence[Client], seconds: float) -> float:
    """Keep every client's requests in flight for so long; returns requests a second."""
    by_fd = {client.fileno(): client for client in clients}
    start, before = time.monotonic(), sum(client.done for client in clients)
    while time.monotonic() < start + seconds:
        poll = select.poll()
        for fd, client in by_fd.items():
            client.fill()
            poll.register(fd, client.wanted())
        for fd, events in poll.poll():
            by_fd[fd].step(events)
    for client in clients:
        client.finish()
    return (sum(client.done for client in clients) - before) / (time.monotonic() - start)


class Peak:
    """The most memory that a server takes during a with block."""

    def __init__(self, server: Server) -> None:
        """Watch *server*."""
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.kinds = server.memory()
        self.threads = 0

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL):
            self._look()

    def _look(self) -> None:
        self.kinds = max(self.kinds, self._server.memory(), key=beside_pools)
        self.threads = max(self.threads, psutil.Process(self._server.pid).num_threads())

    def __enter__(self) -> Peak:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, with one last look."""
        self._stop.set()
        self._thread.join()
        self._look()


@contextlib.contextmanager
def connected(server: Server, names: Sequence[str], pages: int, depth: int) -> Iterator[list[Client]]:
    """A client for each export."""
    with contextlib.ExitStack() as stack:
        clients = []
        for name in names:
            clients.append(Client(server.socket, name, pages, depth))
            stack.callback(clients[-1].close)
        yield clients


def in_mib(kinds: dict[str, int]) -> dict[str, float]:
    """The same in MiB, with what counts in front."""
    return {"beside_pools": beside_pools(kinds) / MIB} | {kind: nbytes / MIB for kind, nbytes in kinds.items()}


def measure(
    exports: int = 100, *, size: int = 4 * MIB, depth: int = 16, seconds: float = 10, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything, in one run; memory in MiB, CPU as a share of one processor, times in seconds."""
    names = [f"guest{n}" for n in range(exports)]
    with leftovers.directory("/var/tmp") as disk, leftovers.directory("/dev/shm") as pools:
        start = time.monotonic()
        with serving(disk, pools, names, size, options=options) as server:
            result: dict[str, Any] = {"exports": exports, "startup_s": time.monotonic() - start}
            result["alone_mib"] = in_mib(server.memory())
            result["alone_cpu"] = server.idle_cpu(seconds / 2)
            with connected(server, names, size // PAGE, depth) as clients:
                result["connected_mib"] = in_mib(server.memory())
                with Peak(server) as peak:
                    result["requests_per_s"] = load(clients, seconds)
                result |= {"peak_mib": in_mib(peak.kinds), "peak_threads": peak.threads}
                result["idle_cpu"] = server.idle_cpu(seconds / 2)
            result["disconnected_mib"] = in_mib(server.memory())
    return result


def render(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    lines = [f"{result['exports']} exports in one nbdkit; started in {result['startup_s']:.2f} s"]
    for when in ("alone", "connected", "peak", "disconnected"):
        kinds = result[f"{when}_mib"]
        rest = ", ".join(f"{kind} {kinds[kind]:.1f}" for kind in ("anonymous", "files", "pools"))
        lines.append(f"{when:>13}: {kinds['beside_pools']:6.1f} MiB beside the pools ({rest})")
    lines.append(f"load: {result['requests_per_s']:.0f} requests/s of 4 KiB, {result['peak_threads']} threads")
    lines.append(f"idle: {result['alone_cpu']:.1%} of a CPU without clients, {result['idle_cpu']:.1%} with idle ones")
    return "\n".join(lines)
