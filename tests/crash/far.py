# SPDX-License-Identifier: BSD-3-Clause
"""The host that has a device's file: its NBD server is killed and hangs by plan, and is looked after."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic

from tests.crash.history import Act, server_faults
from tests.crash.replay import File, Operation, append, locked
from tests.support.harness import wait_until
from tests.support.remotes import Remote

POLL = 0.01  # seconds


class FarHost:
    """A server of one file, which comes back at once from what is not said to keep it away (recorder.c)."""

    def __init__(
        self,
        run: Path,
        file: Path,
        record: Path,
        rng: random.Random,
        environment: Callable[[str], dict[str, str]],
        *,
        fua: bool,
    ) -> None:
        """*environment*: of a process with these faults."""
        run.mkdir()
        self.away = run / "away"  # is there while it is away
        self._late = run / "away.late"  # and this while it holds a change back
        self._may_be_late = self._is_held = self._is_held_over = False  # a change; from the life before
        self._let_go_at = 0.0  # by the monotonic clock
        self.has_killed = False  # whether it had the process killed that waits for a change
        self.failures = False  # whether it may fail, too
        self.forget: Callable[[], File]  # its host dies: what the file is then
        self._remote = Remote(run, [*([] if fua else ["--filter=fua"]), "file", str(file)])
        self._file, self._record, self._rng, self._environment = file, record, rng, environment

    @property
    def uri(self) -> str:
        """What it exports."""
        return self._remote.uri

    def start_anew(self, faults: str = "") -> None:
        """Start, or end and start again, unless it holds a change back of a process that was killed."""
        self.has_killed = False
        self._is_held = self._is_held_over = self._late.exists()
        if not self._is_held:
            self.start(faults)

    def start(self, faults: str = "") -> None:
        """Start, or end and start again."""
        self.kill()
        self._may_be_late = "l" in faults
        self._remote.start(self._environment(faults))

    def kill(self) -> None:
        """SIGKILL: not between what it does and the record of that."""
        with locked(self._record):
            self._remote.kill()
        self._late.unlink(missing_ok=True)

    def attend(self, calls: Connection, kill: Callable[[], None]) -> None:
        """Do what is called for, and have it back when it was killed, until nobody can call any more.

        The caller may be *killed* when a change of his is held back.
        """
        self._let_go_at = monotonic() + self._rng.random() / 2
        while True:
            ready = self._wait(calls)
            if self._late.exists():
                self._hold_back(kill)
            if calls in ready:
                try:
                    act = calls.recv()
                except EOFError:
                    return
                self._obey(act)
                calls.send(None)
            elif not (self.away.exists() or self._remote.is_alive()):
                self._return()

    def _wait(self, calls: Connection) -> list[Connection]:
        """For a call, or as long as it takes to see what else has happened."""
        seconds = POLL if self._may_be_late else None
        if self.away.exists():
            return [ready for ready in wait([calls], seconds) if isinstance(ready, Connection)]
        ended = os.pidfd_open(self._remote.pid)
        try:
            return [ready for ready in wait([calls, ended], seconds) if isinstance(ready, Connection)]
        finally:
            os.close(ended)

    def _hold_back(self, kill: Callable[[], None]) -> None:
        """Some of a process that is killed, and for some time."""
        if not self._is_held:
            self._is_held = True
            self._let_go_at = monotonic() + self._rng.random() / 2
            if self._rng.random() < 0.7:
                self.has_killed = True
                with locked(self._record):
                    kill()
        elif monotonic() > self._let_go_at:
            self._late.unlink(missing_ok=True)

    def _obey(self, act: Act) -> None:
        if act is Act.SERVER_COMES:
            self._come()
        elif not self.away.exists():
            self.away.touch()
            append(self._record, Operation.AWAY)
            self.kill()

    def _come(self) -> None:
        """It goes on where it hangs, or comes back."""
        if not self.away.exists():
            return
        if self._remote.is_alive() and self._rng.random() < 0.5:
            append(self._record, Operation.BACK)
        else:
            self._return()
        self.away.unlink()

    def _return(self) -> None:
        self.kill()
        if self._rng.random() < 0.5:
            file = self.forget()
            file.write_to(self._file)
            append(self._record, Operation.FORGOT, self._file, pickle.dumps(file))
        append(self._record, Operation.BACK)
        self.start(server_faults(self._rng, failures=self.failures))

    def settle(self) -> None:
        """Return when it is there, and nothing is under way of clients that are gone but what it holds back."""
        if self._is_held_over:
            self._late.unlink(missing_ok=True)
        while self.away.exists() or not self._remote.is_alive() or not self._is_done():
            self._come()
            if not self._remote.is_alive():
                self._return()
            wait_until(self._is_done, "the server to be done")

    def _is_done(self) -> bool:
        return self.away.exists() or not self._remote.is_alive() or self._remote.clients() <= self._late.exists()
