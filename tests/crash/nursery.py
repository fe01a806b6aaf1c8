# SPDX-License-Identifier: BSD-3-Clause
"""Where lives begin: one process under crash/recorder.c forks them, which is cheaper than to start Python for each."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from tests.crash.record import build_recorder
from tests.support import leftovers
from tests.support.harness import ROOT


@cache
def recorder() -> Path:
    """The shim, built once."""
    directory = ExitStack()
    atexit.register(directory.close)
    return build_recorder(directory.enter_context(leftovers.directory("/var/tmp")))


class Nursery:
    """Begins one process at a time."""

    def __init__(self) -> None:
        self._asks, theirs = Pipe()
        command = [sys.executable, "-m", "tests.crash.life", str(theirs.fileno())]
        self._process = subprocess.Popen(
            leftovers.dying_with_us(command), env=os.environ | {"LD_PRELOAD": str(recorder())}, cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        self._pid = 0

    def begin(self, birth: Any, calls: Connection, environment: dict[str, str]) -> None:
        """Have a process live *birth*, by *calls* in touch with us, with these variables besides ours."""
        self._asks.send((birth, environment))
        send_handle(self._asks, calls.fileno(), self._process.pid)
        self._pid = self._asks.recv()

    def kill(self) -> None:
        """SIGKILL, also when it has ended already; `wait` is still to be called."""
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status, negative: the signal that ended it."""
        status = self._asks.recv()
        self._asks.send(None)
        return int(status)

    def close(self) -> None:
        """End it."""
        self._asks.close()
        self._process.wait()


@cache
def nursery() -> Nursery:
    """The one of this process."""
    made = Nursery()
    atexit.register(made.close)
    return made
