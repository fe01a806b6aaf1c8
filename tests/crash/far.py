# SPDX-License-Identifier: BSD-3-Clause
"""The host that has a device's file: its NBD server is killed and hangs by plan, and is looked after."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.crash.history import Act, server_faults
from tests.crash.replay import File, Operation, append, locked
from tests.support.harness import wait_until
from tests.support.remotes import Remote


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
        self.failures = False  # whether it may fail, too
        self.forget: Callable[[], File]  # its host dies: what the file is then
        self._remote = Remote(run, [*([] if fua else ["--filter=fua"]), "file", str(file)])
        self._file, self._record, self._rng, self._environment = file, record, rng, environment

    @property
    def uri(self) -> str:
        """What it exports."""
        return self._remote.uri

    def start(self, faults: str = "") -> None:
        """Start, or end and start again."""
        self.kill()
        self._remote.start(self._environment(faults))

    def kill(self) -> None:
        """SIGKILL: not between what it does and the record of that."""
        with locked(self._record):
            self._remote.kill()

    def attend(self, calls: Connection) -> None:
        """Do what is called for, and have it back when it was killed, until nobody can call any more."""
        while True:
            ready = wait([calls]) if self.away.exists() else self._wait_for_end(calls)
            if calls in ready:
                try:
                    act = calls.recv()
                except EOFError:
                    return
                self._obey(act)
                calls.send(None)
            elif not self.away.exists():
                self._return()

    def _wait_for_end(self, calls: Connection) -> list[Connection]:
        """Or for a call."""
        ended = os.pidfd_open(self._remote.pid)
        try:
            return [ready for ready in wait([calls, ended]) if isinstance(ready, Connection)]
        finally:
            os.close(ended)

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
        """Return when it is there, and nothing is under way of clients that are gone."""
        while self.away.exists() or not self._remote.is_alive() or self._remote.clients():
            self._come()
            if not self._remote.is_alive():
                self._return()
            wait_until(self._is_done, "the server to be done")

    def _is_done(self) -> bool:
        return self.away.exists() or not self._remote.is_alive() or self._remote.clients() == 0
