# SPDX-License-Identifier: BSD-3-Clause
"""The life cycle of devices that are served: opened together, started after nbdkit's fork, closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tmemd.binding import _core
from tmemd.device.backing import note_use
from tmemd.device.clients import Clients
from tmemd.device.config import Debug, DeviceConfig, Uri
from tmemd.device.maintenance import Maintenance
from tmemd.device.parts import Parts, open_parts
from tmemd.device.remote import Watch
from tmemd.device.vhost import VhostDoor
from tmemd.device.warming import Warming
from tmemd.store.poolfile import PoolError

# Seconds. Somebody waits for a device that was handed over; each look at its tail is a read.
HANDOVER_PATIENCE: Final = 0.1
DURABLE_PATIENCE: Final = 0.5


class ServedDevice:
    """An open device: its page path in `core`, and its `maintenance`, which goes on once `start` was called."""

    def __init__(self, parts: Parts, core: _core.Device, owned: ExitStack, debug: Debug) -> None:
        self.config = parts.config
        self.pool_path = parts.pool_path
        self.core = core
        self.clients = Clients()
        self.maintenance = Maintenance(core, parts, debug)
        self._vhost = VhostDoor(self.config.vhost, core, self.config, self.clients) if self.config.vhost else None
        self.watch: Watch | None = None  # of the server that has its file
        overflow = parts.backing.overflow if parts.backing else None
        if parts.file and parts.file.remote:
            self.watch = Watch(core, parts.file.remote, overflow, self.config)
        self.away = parts.backing.away if parts.backing else None  # why it began without its server
        self._warming = Warming(core, parts.pool_fd, parts.pool_path, self.config.warm) if self.config.warm else None
        self._parts = parts
        self._keeper = parts.backing.keeper if parts.backing else None
        self._owned = owned.pop_all()

    def start(self, log: Callable[[str], None] = lambda _: None) -> None:
        """Serve it from this process on, with its maintenance in a thread (call it after any fork).

        *log* is told of clients that are refused, or break the rules.
        """
        self.core.publish_pid()
        if self._keeper:
            self._keeper.stop()
            self._keeper.start(lambda message: log(f"{self.config.name}: {message}"), self)
        self.maintenance.start()
        if self.watch:
            self.watch.start(log)
        if self._vhost:
            self._vhost.start(log)
        if self._warming:
            self._warming.start(lambda message: log(f"{self.config.name}: {message}"))

    def note_use(self) -> None:
        """Say in the backing that the device is about to be used. Raises PoolError."""
        if self._parts.backing:
            note_use(self._parts.backing)

    def patience(self) -> float | None:
        """How long a host that asks for the device may wait: it can have it while all that is written reaches the file.

        In seconds; None: it cannot have it now.
        """
        if self._parts.is_handed_over():
            return HANDOVER_PATIENCE
        return DURABLE_PATIENCE if self.config.durable else None

    def let_go(self, release: Callable[[], None]) -> None:
        """Fail every request from now on, and *release* the device when all that was acknowledged is in the file.

        Raises OSError, and goes on, where that cannot be done.
        """
        try:
            self.core.stop()
            release()
        except OSError:
            self.core.go_on()
            raise
        if self._parts.backing:
            self._parts.backing.let_go()

    def before_fork(self) -> None:
        """End all threads: `start` begins them again. A lease lasts meanwhile."""
        if self._keeper:
            self._keeper.stop()

    def close(self) -> None:
        """End the maintenance, unmap, unlock and close everything. The pool stays, for whoever attaches next."""
        if self._vhost:
            self._vhost.close()
        if self._parts.file and self._parts.file.remote:
            self._parts.file.remote.hurry()
        if self._warming:
            self._warming.stop()
        self.before_fork()
        self.maintenance.stop()
        if self.watch:
            self.watch.stop()
        self.core.close()
        self._owned.close()


def check_together(configs: Sequence[DeviceConfig]) -> None:
    """Check devices that are to be opened together. Raises PoolError."""
    owners: dict[Path | Uri, str] = {}
    for config in configs:
        config.check()
        for path in (config.file if not config.is_read_only else None, config.bitmap, config.vhost):
            if path and owners.setdefault(path, config.name) != config.name:
                raise PoolError(f"{config.name}: {path} is already device {owners[path]}'s")


def open_devices(
    configs: Sequence[DeviceConfig], *, root: Path = Path("/"), debug: Debug = lambda _: None
) -> list[ServedDevice]:
    """Open what *configs* name, creating what is not there yet; nothing on disk changes when one of them fails.

    *root* stands in for / where /proc and /sys are read; *debug* is told what was found and what is done. Raises
    PoolError.
    """
    check_together(configs)
    with ExitStack() as undo:
        served = []
        for config in configs:
            device = _open(config, root, undo, debug)
            undo.callback(device.close)
            served.append(device)
        for device in served:
            device.note_use()
        undo.pop_all()
    return served


def _open(config: DeviceConfig, root: Path, undo: ExitStack, debug: Debug) -> ServedDevice:
    def named_debug(message: str) -> None:
        debug(f"{config.name}: {message}")

    try:
        parts, core, owned = open_parts(config, root, undo, named_debug)
        with owned:
            return ServedDevice(parts, core, owned, named_debug)
    except OSError as error:
        raise PoolError(f"{error.filename or config.name}: {error.strerror or error}") from None


def open_device(config: DeviceConfig, *, root: Path = Path("/")) -> ServedDevice:
    """Open one device, as `open_devices` does."""
    return open_devices([config], root=root)[0]
