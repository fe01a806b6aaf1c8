# SPDX-License-Identifier: BSD-3-Clause
"""Devices served without systemd: an nbdkit for each in a session of its own, found again by a file with its number.

Who dies by itself is not started again.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tmemd import plugin_path
from tmemd.definitions import accounts
from tmemd.definitions.accounts import Account
from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.definitions.systemd import written
from tmemd.definitions.words import why
from tmemd.protocol import ServiceState
from tmemd.store.poolfile import PoolError

_BACKLOG: Final = 16
_INTERVAL: Final = 0.01  # seconds
_TAIL: Final = 4096  # bytes of a log
_START: Final = 19  # of the fields from its state on: when a process started
_ENDED: Final = {"Z", "X"}
# The server notes itself, number and start time, before it becomes nbdkit: whenever we die, it can be found. Its socket
# is handed to it as by systemd (sd_listen_fds(3)). Such an nbdkit ends with its parent, so first its parent is init.
# With a pool mapped it looks big to the OOM killer.
_SCRIPT: Final = """
umask 077
noted=$1 uid=$2 gid=$3
shift 3
exec 3<&0
serve() {
    until read -r stat </proc/self/stat && parent=${stat#* * * } && [ "${parent%% *}" != $$ ]; do sleep 0.01; done
    echo "$stat" >"$noted.new" && mv "$noted.new" "$noted"
    echo -900 2>/dev/null >/proc/self/oom_score_adj
    LISTEN_FDS=1 LISTEN_PID=${stat%% *} \\
        exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs "$@" </dev/null
}
serve "$@" &
"""


class Processes:
    """The servers that were started here."""

    survives = False

    def __init__(self, place: Place) -> None:
        self._place = place

    def check(self, definition: Definition) -> None:
        """Raise PoolError where there is no tmemd: nobody would start one, and a new device gets no pool without."""
        if not self._place.tmemd.exists():
            raise PoolError(
                f"no tmemd listens at {self._place.tmemd}, for {definition.name} to have a pool: start one"
                " (tmemd --tmpfs-size 50% --group tmemd --allow-group tmemd)"
            )

    def install(self, definition: Definition) -> None:
        """There is nothing that could start it at boot."""

    def start(self, definition: Definition) -> None:
        """Begin to start it."""
        if self._is_alive(definition.name):
            return
        account = accounts.find(self._place, definition.name)
        if account is None:
            raise PoolError(f"there is no user {accounts.user_of(definition.name)} to serve {definition.name}")
        self._prepare(definition, account)
        self._spawn(definition, account)

    def stop(self, definition: Definition) -> None:
        """Kill its server."""
        self._kill(definition.name)
        for path in (self._place.socket(definition.name), self._place.pid_file(definition.name)):
            path.unlink(missing_ok=True)

    def restart(self, definition: Definition) -> None:
        """Kill the server that there is, and begin to start another."""
        self._kill(definition.name)
        self.start(definition)

    def uninstall(self, name: str) -> None:
        """Stop it, and forget what it said."""
        self.stop(Definition(name))
        self._place.log(name).unlink(missing_ok=True)

    def states(self, names: Sequence[str]) -> list[ServiceState]:
        """What each is."""
        return [self._state(name) for name in names]

    def _state(self, name: str) -> ServiceState:
        if self._is_alive(name):
            return "running"
        return "failed" if self._place.pid_file(name).exists() else "stopped"

    def said(self, name: str) -> str:
        """Why it failed, in the last words of its server."""
        with suppress(OSError):
            return why(self._place.log(name).read_bytes()[-_TAIL:].decode(errors="replace"))
        return why("")

    def _prepare(self, definition: Definition, account: Account) -> None:
        """What the unit has systemd do."""
        directory = self._place.vhost_directory(definition.name)
        directory.mkdir(parents=True, exist_ok=True)
        os.chown(directory, account.uid, accounts.qemu_gid(self._place))
        directory.chmod(0o2750)
        disk = written(definition, self._place)
        if disk and disk.is_block_device():
            os.chown(disk, account.uid, -1)

    def _spawn(self, definition: Definition, account: Account) -> None:
        log, noted = self._place.log(definition.name), self._place.pid_file(definition.name)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        noted.unlink(missing_ok=True)
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        with self._listening(definition.name) as listener, open(log, "wb", 0) as said:
            words = map(str, [noted, account.uid, account.gid])
            subprocess.run(
                ["sh", "-c", _SCRIPT, "sh", *words, *self._command(definition)], cwd="/",
                start_new_session=True, env={"PATH": path}, stdin=listener, stdout=said, stderr=said,
                check=True,
            )  # fmt: skip
            while not noted.exists():
                time.sleep(_INTERVAL)

    def _command(self, definition: Definition) -> list[str]:
        where = [f"tmemd={self._place.tmemd}", f"pools={self._place.pools}"]
        return ["nbdkit", "-f", "python", str(plugin_path()), *definition.keys(), *where, *definition.options]

    @contextmanager
    def _listening(self, name: str) -> Iterator[int]:
        """The socket of the device, open to those who are in the group of QEMU."""
        path = self._place.socket(name)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            except OSError as error:
                raise PoolError(f"{path}: {error.strerror or error}") from None
            finally:
                os.umask(before)
            os.chown(path, 0, accounts.qemu_gid(self._place))
            path.chmod(0o660)
            listener.listen(_BACKLOG)
            yield listener.fileno()

    def _kill(self, name: str) -> None:
        with self._process(name) as process:
            if process is None:
                return
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])

    def _is_alive(self, name: str) -> bool:
        with self._process(name) as process:
            return process is not None

    @contextmanager
    def _process(self, name: str) -> Iterator[int | None]:
        """The server that was started, if it lives; another process that has its number by now is not it."""
        try:
            noted = self._place.pid_file(name).read_text()
            process = os.pidfd_open(int(noted.split()[0]))
        except OSError:
            yield None
            return
        try:
            yield process if _is_running(noted) else None
        finally:
            os.close(process)


def _is_running(noted: str) -> bool:
    """Whether the process that noted this of itself still runs."""
    try:
        now = Path(f"/proc/{noted.split(maxsplit=1)[0]}/stat").read_text()
    except OSError:
        return False
    return _fields(now)[_START] == _fields(noted)[_START] and _fields(now)[0] not in _ENDED


def _fields(stat: str) -> list[str]:
    """The state of a process and what follows (proc_pid_stat(5)): the name before them may hold anything."""
    return stat.rpartition(")")[2].split()
