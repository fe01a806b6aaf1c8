# SPDX-License-Identifier: BSD-3-Clause
"""NBD servers that have devices' files, and that hang, fail, forget and die."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.harness import DEADLINE, ROOT, environment, wait_until
from tests.support.leftovers import dying_with_us

VOLATILE = ROOT / "tests" / "support" / "volatile.py"


class Remote:
    """One nbdkit on a socket in *run*, which goes and comes."""

    def __init__(self, run: Path, plugin: Sequence[str]) -> None:
        """*plugin*: with its parameters and filters, as nbdkit takes them."""
        self.run, self._plugin = run, list(plugin)
        self.socket = run / "remote.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, more: dict[str, str] | None = None) -> Remote:
        """Start, with *more* in its environment, and wait until it listens."""
        pidfile = self.run / "remote.pid"
        for left_over in (self.socket, pidfile):
            left_over.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", str(self.socket), "-P", str(pidfile), *self._plugin]
        with (self.run / "remote.log").open("ab") as log:
            self._process = subprocess.Popen(dying_with_us(command), stderr=log, env=environment() | (more or {}))
        wait_until(lambda: pidfile.exists() or not self.is_alive(), "the server to listen")
        assert self.is_alive(), (self.run / "remote.log").read_text()
        return self

    def is_alive(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def clients(self) -> int:
        """How many are connected."""
        try:
            links = [file.readlink() for file in Path(f"/proc/{self.pid}/fd").iterdir()]
        except OSError:  # it has just ended, or closed one
            return 0 if not self.is_alive() else self.clients()
        return sum(str(link).startswith("socket:") for link in links) - 1

    def kill(self) -> None:
        """SIGKILL: what it had not flushed is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE)
            self._process = None

    def ask_to_end(self) -> None:
        """SIGTERM: it refuses what is asked of it, and ends when its last client has gone."""
        assert self._process is not None
        self._process.terminate()

    def tell(self, name: str, content: str = "") -> None:
        """Have a volatile disk `hang`, `fail` or have another `size`."""
        (self.run / name).write_text(content)

    def untell(self, name: str) -> None:
        """No longer."""
        (self.run / name).unlink()


def volatile(run: Path, size: int, *parameters: str) -> Remote:
    """A disk with a volatile cache (volatile.py takes the *parameters*), of zeros and *size* bytes; to be started."""
    run.mkdir()
    disk = run / "disk"
    disk.touch()
    os.truncate(disk, size)
    return Remote(run, ["python", str(VOLATILE), f"file={disk}", f"run={run}", *parameters])
