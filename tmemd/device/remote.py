# SPDX-License-Identifier: BSD-3-Clause
"""The NBD server that has a device's pages: connected to, and watched while the device is served."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from tmemd.binding import _core
from tmemd.device.config import DeviceConfig, Uri
from tmemd.store.poolfile import AwayError, PoolError

_LOOK_EVERY: Final = 0.5  # seconds


def connect(config: DeviceConfig, uri: Uri, *, write: bool) -> _core.Remote:
    """Connect to the server, which has time until the device's time-out. Raises AwayError, PoolError."""
    remote, away = reach(config, uri, write=write)
    if away:
        raise away
    return remote


def reach(config: DeviceConfig, uri: Uri, *, write: bool) -> tuple[_core.Remote, AwayError | None]:
    """The same where one may go on without it: also why it is away. Raises PoolError."""
    remote = _remote(uri, config.connections, config.timeout)
    try:
        remote.connect()
    except OSError as error:
        return remote, AwayError(f"{uri}: {error.strerror}")
    status = remote.status
    if write and status.read_only:
        raise PoolError(f"{uri}: the server lets nobody write to it")
    if write and not status.can_flush:
        raise PoolError(f"{uri}: the server has no FLUSH, so nothing that is written there is ever known to be durable")
    return remote, None


def _remote(uri: Uri, connections: int, timeout: float) -> _core.Remote:
    """Not connected yet, to a server that has to prove who it is, if any has. Raises PoolError."""
    _check_authority(uri)
    return _core.Remote(str(uri), connections=connections, timeout=timeout)


def _check_authority(uri: Uri) -> None:
    """Raise PoolError where libnbd finds no authority's certificate, for it accepts any server then."""
    parts = urlsplit(uri)
    query = parse_qs(parts.query)
    if not parts.scheme.startswith("nbds") or "tls-psk-file" in query:
        return
    places = query.get("tls-certificates") or _usual_certificates()
    if not any(os.access(Path(place) / "ca-cert.pem", os.R_OK) for place in places):
        raise PoolError(
            f"{uri}: there is no {places[-1]}/ca-cert.pem that this user can read, and without it any server would be"
            " trusted: say with tls-certificates=DIR where it is"
        )


def _usual_certificates() -> list[str]:
    if os.geteuid() == 0:
        return ["/etc/pki/libnbd"]
    home = Path.home()
    return [f"{home}/.pki/libnbd", f"{home}/.config/pki/libnbd"]


def size_of(uri: Uri) -> int:
    """Bytes that the server exports there. Raises PoolError."""
    if not urlsplit(uri).scheme:
        raise PoolError(f"{uri}: not an NBD URI")
    probe = _remote(uri, 1, DeviceConfig.timeout)
    try:
        probe.connect()
    except OSError as error:
        raise PoolError(f"{uri}: {error.strerror}") from None
    return probe.status.size


class RemoteStore:
    """What a server exports as the tail's store."""

    def __init__(self, remote: _core.Remote) -> None:
        self._remote = remote

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self._remote.status.size

    def read(self, offset: int, length: int) -> bytes:
        """From the server; nothing of it is kept here."""
        return self._remote.read(offset, length)

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:  # noqa: ARG002 - it always is
        """Write to the server."""
        self._remote.write(offset, data)

    def flush(self) -> None:
        """Nothing is left to be done."""


class Watch:
    """Sees to it that a served device's server is connected again, and says once that it went and that it is back."""

    def __init__(
        self, core: _core.Device, remote: _core.Remote, overflow: _core.Overflow | None, config: DeviceConfig
    ) -> None:
        self._core, self._remote, self._overflow, self._config = core, remote, overflow, config
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = ""

    def start(self, log: Callable[[str], None]) -> None:
        """Begin, in a thread of this process: connecting may take long."""
        self._tell_all(log)
        self._thread = threading.Thread(target=self._run, args=(log,), name="tmem-remote", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self, log: Callable[[str], None]) -> None:
        while not self._stop.wait(_LOOK_EVERY):
            self.look(log)

    def look(self, log: Callable[[str], None]) -> None:
        """Connect if it is time to, write back what lies in the overflow file, pass trims on; *log* is told of news."""
        self._remote.look_after()
        self._tell_all(log)
        if not self._remote.status.connections:
            return
        if self._overflow:
            self._write_back(self._overflow)
        self._pass_trims()

    def _tell_all(self, log: Callable[[str], None]) -> None:
        self._tell(self._publish(), log)

    def _publish(self) -> _core.RemoteStatus:
        status = self._remote.status
        self._core.publish_remote(status, self._overflow.count if self._overflow else 0)
        return status

    def _write_back(self, overflow: _core.Overflow) -> None:
        """What was written while it was away, until that is done, or it is away again."""
        try:
            while overflow.count and not self._stop.is_set():
                overflow.write_back()
        except OSError:  # counted as a loss, or said by the server; tried again
            self._publish()  # a failed sync is to be known to whoever serves the pool after us

    def _pass_trims(self) -> None:
        """Half of the time at most, and not while it would go to the overflow file."""
        end = time.monotonic() + _LOOK_EVERY
        if self._overflow and self._overflow.count:
            return
        with suppress(OSError):
            while self._core.pass_trims() and time.monotonic() < end and not self._stop.is_set():
                pass

    def _tell(self, status: _core.RemoteStatus, log: Callable[[str], None]) -> None:
        """Once that it is away, once that another came back (the core says "it ..." then), and the end."""
        why = "" if status.connections else status.why
        told = why if why.startswith("it ") else "away" if why else ""
        if told == self._told or not (why or status.connections):
            return
        self._told = told
        if why:
            writes = f"; writes go to {self._config.overflow}" if self._overflow else ""
            log(
                f"{self._core.name}: {self._config.file} is away ({why}): pages in RAM are served, what needs it waits"
                f" {self._config.timeout:g} s{writes}"
            )
        else:
            log(f"{self._core.name}: {self._config.file} is back")
