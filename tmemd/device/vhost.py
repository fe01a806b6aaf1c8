# SPDX-License-Identifier: BSD-3-Clause
"""The virtio door: a socket where vhost-user-blk front ends find the device, beside NBD's."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemd.binding import _core
from tmemd.device.clients import EVERYBODY, Clients, InUseError
from tmemd.device.config import DeviceConfig
from tmemd.store.poolfile import PoolError
from tmemd.system import peer

BACKLOG: Final = 16
RETRY_SECONDS: Final = 1


def block_bytes(config: DeviceConfig) -> int:
    """The guest's logical block: a page for swap, and 512 bytes for disks, whose partition tables count in those."""
    is_disk = config.durable or config.source is not None
    return 512 if is_disk or config.size % _core.PAGE else _core.PAGE


class VhostDoor:
    """Listens on a socket, and serves each front end that comes in a thread of its own."""

    def __init__(self, path: Path, core: _core.Device, config: DeviceConfig, clients: Clients) -> None:
        """Raises PoolError when nobody can listen at *path*."""
        self._path = path
        self._core = core
        self._config = config
        self._clients = clients
        self._listener = _listen(path)
        self._inode = path.stat().st_ino
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sessions: dict[socket.socket, threading.Thread] = {}
        self._thread: threading.Thread | None = None
        self._log: Callable[[str], None] = lambda _: None

    def start(self, log: Callable[[str], None]) -> None:
        """Let front ends in. *log* is told of those that are refused, or break the rules."""
        self._log = log
        self._thread = threading.Thread(target=self._accept, name=f"vhost {self._config.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, send away who is there once what he asked for is answered, and remove the socket."""
        with self._lock:
            self._closing.set()
            sessions = list(self._sessions.items())
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread:
            self._thread.join()
        self._listener.close()
        for front_end, thread in sessions:
            with suppress(OSError):
                front_end.shutdown(socket.SHUT_RDWR)
            thread.join()
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                self._let_in(self._listener.accept()[0])
            except (OSError, RuntimeError) as error:  # there is no descriptor, or no thread
                if not self._closing.is_set():
                    self._log(f"{self._path}: a front end could not be let in: {error}")
                self._closing.wait(RETRY_SECONDS)

    def _let_in(self, front_end: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(front_end,), daemon=True)
        with self._lock:
            if self._closing.is_set():
                front_end.close()
                return
            try:
                thread.start()
            except RuntimeError:
                front_end.close()
                raise
            self._sessions[front_end] = thread

    def _serve(self, front_end: socket.socket) -> None:
        try:
            who = peer.of_process(peer.Credentials.of(front_end).pid)
            self._clients.enter(EVERYBODY if self._config.shared else who)
        except (InUseError, OSError) as error:
            self._log(f"{self._config.name} is in use by {error}: one client at a time, or clients=any")
        else:
            self._serve_client(front_end, who)
        finally:
            with self._lock:
                del self._sessions[front_end]
            front_end.close()

    def _serve_client(self, front_end: socket.socket, who: peer.Peer) -> None:
        try:
            self._core.serve_vhost(
                front_end.fileno(), serial=self._config.name, block_bytes=block_bytes(self._config),
                read_only=self._config.is_read_only, poll_us=self._config.poll_us,
            )  # fmt: skip
        except OSError as error:
            self._log(f"{self._config.name}: {who.name} at {self._path}: {error.strerror}")
        finally:
            self._clients.leave()


def _listen(path: Path) -> socket.socket:
    """A socket at *path*, in the place of one that nobody listens on any more. Raises PoolError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.lexists(path) and not _is_left_over(path):
            raise PoolError(f"{path}: somebody else's; vhost= names a socket that is made anew")
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o660)  # by which groups it is reached is for its directory to say
        listener.listen(BACKLOG)
    except (PoolError, OSError) as error:
        listener.close()
        if isinstance(error, PoolError):
            raise
        raise PoolError(f"{path}: {error.strerror or error}") from None
    return listener


def _is_left_over(path: Path) -> bool:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
