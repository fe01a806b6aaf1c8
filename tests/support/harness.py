# SPDX-License-Identifier: BSD-3-Clause
"""What the tests share: a server that is always reaped, connections to it, and waiting for events with a deadline."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import nbd

from tests.support.leftovers import dying_with_us
from tests.support.vhost.disk import Disk
from tmemd.store import poolfile, requests
from tmemd.store.requests import ANY_PAGE, Choice, Queued, Request

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugin" / "tmem.py"
KIB = 1 << 10
MIB = 1 << 20
# Only a guard against a hang: no test measures time with it.
DEADLINE = 180.0  # seconds; a budget that was given back too early is held for up to half a minute before it grows


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Poll until *ready* is true; AssertionError naming *what* when it never is."""
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, f"waited {DEADLINE:.0f} s in vain for {what}"
        time.sleep(0.002)


def environment() -> dict[str, str]:
    """The environment nbdkit needs to find this interpreter's packages."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def device(name: str, pools: Path, size: object, backing: object, limit: object, **keys: object) -> list[str]:
    """The plugin's parameters for one device."""
    keys = {"name": name, "size": size, "backing": backing, "limit": limit, "pools": pools} | keys
    return [f"{key}={value}" for key, value in keys.items()]


def cache_device(name: str, pools: Path, source: object, limit: object, **keys: object) -> list[str]:
    """The same of a cache device."""
    keys = {"name": name, "source": source, "limit": limit, "pools": pools} | keys
    return [f"{key}={value}" for key, value in keys.items()]


def nbdkit_command(socket: Path | None, parameters: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """The command line that serves *parameters* in the foreground, on a *socket* or where the *options* say."""
    listen = ["-U", str(socket)] if socket else []
    return ["nbdkit", "-f", *listen, *options, "python", str(PLUGIN), *parameters]


def connect(socket: Path, export: str = "") -> nbd.NBD:
    """A new connection. Requests of any size and offset are let through for the server to judge."""
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.set_export_name(export)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_unix(str(socket))
    return handle


Door = Literal["nbd", "vhost"]


class Server:
    """One nbdkit with our plugin in it, started by `start` and ended by `stop` or `kill`."""

    def __init__(
        self,
        run: Path,
        parameters: Sequence[str],
        options: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        door: Door = "nbd",
        *,
        listen: Sequence[str] = (),
    ) -> None:
        """With *door* vhost its last device is open to vhost-user front ends as well, and clients come by that.

        *listen* is nbdkit's options for another place than the socket; `connect` does not go there.
        """
        self._wrapper = list(wrapper)  # a command that executes its arguments in its place
        self.socket = run / "nbd.sock"
        self.vhost = run / "vhost.sock"
        self._door = door
        self.parameters = [*parameters, *([f"vhost={self.vhost}"] if door == "vhost" else [])]
        self._options = [*listen, *options]
        self._listen = None if listen else self.socket
        self._pidfile = run / "nbdkit.pid"
        self._log = run / "nbdkit.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Server:
        """Start and wait until it accepts connections. AssertionError with its messages when it ends instead."""
        for left_over in (self.socket, self._pidfile):
            left_over.unlink(missing_ok=True)
        command = nbdkit_command(self._listen, self.parameters, ["-P", str(self._pidfile), *self._options])
        with self._log.open("ab") as log:
            whole = dying_with_us([*self._wrapper, *command])
            self._process = subprocess.Popen(whole, stderr=log, env=environment())
        wait_until(self._ready_or_ended, "nbdkit to listen")
        assert self._process.poll() is None, f"nbdkit ended at its start:\n{self.log()}"
        return self

    def _ready_or_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None or self._pidfile.exists()

    def log(self) -> str:
        """All that nbdkit wrote to its standard error so far, restarts included."""
        return self._log.read_text(errors="replace")

    def connect(self, export: str = "", door: Door | None = None) -> nbd.NBD:
        """A new connection to *export*. The error names nbdkit's end, if that is why there is none.

        By *door* vhost, the default if it was started with that, it is a Disk, used in the same way.
        """
        try:
            return Disk(self.vhost) if (door or self._door) == "vhost" else connect(self.socket, export)
        except nbd.Error as error:
            if self._process and (status := self._process.poll()) is not None:
                error.add_note(f"nbdkit ended with status {status}:\n{self.log()[-2000:]}")
            raise

    @contextlib.contextmanager
    def client(self, export: str = "", door: Door | None = None) -> Iterator[nbd.NBD]:
        """A connection for the length of a with block."""
        handle = self.connect(export, door)
        try:
            yield handle
        finally:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        """SIGTERM, once every client has gone; returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(DEADLINE)

    def kill(self) -> None:
        """SIGKILL; no harm when it is gone already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


Serve = Callable[..., Server]  # the fixture in tests/conftest.py


def counters(pool: Path) -> poolfile.Counters:
    """The counters of a pool as another process sees them."""
    with open(pool, "rb") as file:
        return poolfile.read_counters(file.fileno(), pool)


def doors(pool: Path) -> poolfile.Doors:
    """What a pool says of the doors of its device."""
    with open(pool, "rb") as file:
        return poolfile.Snapshot().take(file.fileno(), pool).doors()


def taken(path: Path) -> int:
    """Bytes the file system took for *path*: on tmpfs, RAM."""
    return path.stat().st_blocks * 512


def waiting(fd: int) -> list[Queued]:
    """What a pool's plugin was asked for, and is still to do."""
    return requests.waiting(poolfile.Snapshot().take(fd, "pool"))


class Control:
    """The control page of a pool, as tmemctl writes it."""

    def __init__(self, pool: Path) -> None:
        self.pool = pool
        self._fd = os.open(pool, os.O_RDWR)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def target(self, nbytes: int) -> None:
        """Set the target."""
        poolfile.write_target(self._fd, nbytes)

    def frozen(self, frozen: bool) -> None:
        """Freeze or thaw."""
        poolfile.write_frozen(self._fd, frozen)

    def ask(self, op: Request, argument: int = 0, choice: Choice = ANY_PAGE) -> int:
        """Ask for something without waiting; returns the number that `answered` takes."""
        return requests.ask(self._fd, op, argument, choice)

    def answered(self, number: int) -> bool:
        """Whether that request is done."""
        return requests.answer_to(self._fd, number) is not None

    def request(self, op: Request, argument: int = 0, choice: Choice = ANY_PAGE) -> int:
        """Ask for something and wait until it is done; returns its errno."""
        number = self.ask(op, argument, choice)
        wait_until(lambda: self.answered(number), f"{op.name} to be done")
        return requests.answer_to(self._fd, number) or 0
