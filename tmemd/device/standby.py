# SPDX-License-Identifier: BSD-3-Clause
"""A device that another host has, and that is served here from the first request on that needs it: for live migration.

Until then its size is known, and the pages can be read that always are in the file. The first other request has the
owner asked to let go, and waits, with all that come meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias

from tmemd.binding import _core
from tmemd.device import backing as backings
from tmemd.device.clients import Clients
from tmemd.device.config import Debug, DeviceConfig
from tmemd.device.lease import Fence
from tmemd.device.parts import boot_id_of, claim_pool, lease_of, open_parts, open_pool
from tmemd.device.serve import ServedDevice, check_together, open_devices
from tmemd.store import poolindex
from tmemd.store.poolfile import PAGE, PoolError

# Seconds. Who is asked for a device that was handed over answers in a tenth; one that is written back may never.
_ASK_OFTEN: Final = 0.05
_ASK_SELDOM: Final = 0.5


class View:
    """What one has of a device that is elsewhere: its tail, its file, and a pool from which it will be served."""

    def __init__(self, config: DeviceConfig, root: Path) -> None:
        """Raises PoolError."""
        with ExitStack() as owned, ExitStack() as undo:
            found = backings.glance(config)
            if not found:
                raise PoolError(f"{config.backing} has no tail any more")
            owned.callback(found.close)
            fd, path = open_pool(config, undo)
            owned.callback(os.close, fd)
            claim_pool(fd, path)
            undo.pop_all()
            self.store = found.store
            self.lease = lease_of(fd, boot_id_of(root), config, found.tail, Fence())
            self.close = owned.pop_all().close


class Waiting:
    """Who waits for the device, until there is one or it is closed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.device: ServedDevice | None = None
        self._is_over = False

    def wait(self) -> ServedDevice:
        """Raises OSError where there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self.device or self._is_over)
            if self.device is None:
                raise OSError("the server ends")
            return self.device

    def end(self, device: ServedDevice | None) -> None:
        """There is one, or will be none."""
        with self._changed:
            self.device, self._is_over = device, device is None
            self._changed.notify_all()


class StandbyDevice:
    """Stands in for a device that is another host's, and is what nbdkit's callbacks have in its place for ever."""

    def __init__(self, config: DeviceConfig, root: Path, debug: Debug) -> None:
        """Raises PoolError."""
        self.config, self.name, self.size = config, config.name, config.size
        self.clients = Clients()
        self._root, self._debug = root, debug
        self._waiting = Waiting()
        self._asking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._connections = 0
        self._log: Callable[[str], None] = lambda _: None
        self._looking = threading.Lock()  # guards the view, while it is read from
        self._view: View | None = View(config, root)

    def is_elsewhere(self) -> bool:
        """Whether another host has it, so that nothing but to stand by is possible. Raises PoolError."""
        assert self._view
        try:
            return self._view.lease.is_elsewhere()
        except OSError as error:
            raise PoolError(f"{self.config.backing}: {error.strerror}") from None

    @property
    def core(self) -> StandbyDevice:
        """What requests go to."""
        return self

    def start(self, log: Callable[[str], None] = lambda _: None) -> None:
        """Nothing is to be done until somebody asks. *log* is told who had the device, and that it came."""
        self._log = log

    def before_fork(self) -> None:
        """No thread runs yet."""

    def count_nbd(self, more: int) -> None:
        """So many connections have come, or gone."""
        self._connections += more
        if device := self._waiting.device:
            device.core.count_nbd(more)

    def read_early(self, buffer: memoryview, offset: int) -> bool:
        """Read what the file holds for sure, whoever has the device. False: it must be asked for. Raises OSError."""
        first, end = offset // PAGE, -(-(offset + len(buffer)) // PAGE)
        pages = -(-self.size // PAGE)
        with self._looking:
            if not self._view or not all(poolindex.is_read_by_blkid(page, pages) for page in range(first, end)):
                return False
            start = offset - first * PAGE
            buffer[:] = self._view.store.read(first * PAGE, (end - first) * PAGE)[start : start + len(buffer)]
        return True

    @property
    def has_come(self) -> bool:
        """Whether it is served here."""
        return self._waiting.device is not None

    def taken(self) -> _core.Device:
        """The device itself, which is asked for if need be. Raises OSError where it will not be had."""
        if self._waiting.device is None:
            self._ask()
        return self._waiting.wait().core

    def _ask(self) -> None:
        with self._asking:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"tmem-{self.name}", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        failure, pause = "", _ASK_OFTEN
        self._log(f"{self.name}: the device is asked for")
        while not self._stop.is_set():
            try:
                with self._looking:
                    self._view = self._view or View(self.config, self._root)
                if self._view.lease.ask():
                    self._take(self._view)
                    return
            except (OSError, PoolError) as error:
                if failure != str(error):  # said once, however often it comes
                    self._log(f"{self.name}: it cannot be taken ({error}); trying again")
                failure = str(error)
            self._stop.wait(pause)
            pause = min(1.05 * pause, _ASK_SELDOM)

    def _take(self, view: View) -> None:
        with self._looking:
            view.close()  # in order to be opened for good
            self._view = None
        with ExitStack() as undo:
            parts, core, owned = open_parts(self.config, self._root, undo, self._debug, view.lease.looked)
            with owned:
                device = ServedDevice(parts, core, owned, self._debug)
            undo.callback(device.close)
            device.note_use()
            undo.pop_all()
        device.clients = self.clients
        device.start(self._log)
        device.core.count_nbd(self._connections)
        self._log(f"{self.name}: the device is served here now")
        self._waiting.end(device)

    def close(self) -> None:
        """Let go of it all."""
        self._stop.set()
        if not self._waiting.device:
            self._waiting.end(None)
        if self._thread:
            self._thread.join()
        if self._waiting.device:
            self._waiting.device.close()
        elif self._view:
            self._view.close()


Handle: TypeAlias = _core.Device | StandbyDevice


def open_or_stand_by(configs: Sequence[DeviceConfig], *, debug: Debug) -> list[ServedDevice | StandbyDevice]:
    """Open devices as `open_devices` does; some stand by, for another host has them. Raises PoolError."""
    check_together(configs)
    with ExitStack() as undo:
        waiting = {config.name: device for config in configs if (device := _stand_by(config, debug, undo))}
        served = open_devices([config for config in configs if config.name not in waiting], debug=debug)
        undo.pop_all()
    return [*served, *waiting.values()]


def _stand_by(config: DeviceConfig, debug: Debug, undo: ExitStack) -> StandbyDevice | None:
    found = backings.glance(config) if config.standby else None
    if not found:
        return None
    found.close()
    device = StandbyDevice(config, Path("/"), debug)
    if device.is_elsewhere():
        undo.callback(device.close)
        return device
    device.close()
    return None


# nbdkit's callbacks, where any device stands by.


def _taken(h: Handle) -> _core.Device:
    return h.taken() if isinstance(h, StandbyDevice) else h


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Read what is known, or from the device."""
    if not isinstance(h, StandbyDevice) or not h.read_early(buf, offset):
        _core.pread(_taken(h), buf, offset, flags)


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Write to the device."""
    _core.pwrite(_taken(h), buf, offset, flags)


def flush(h: Handle, flags: int) -> None:
    """Of what was written here."""
    if not isinstance(h, StandbyDevice) or h.has_come:
        _core.flush(_taken(h), flags)


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Trim the device."""
    _core.trim(_taken(h), count, offset, flags)


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Zero a part of the device."""
    _core.zero(_taken(h), count, offset, flags)


def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    """A hint, which nobody is asked to let go for."""
    if not isinstance(h, StandbyDevice) or h.has_come:
        _core.cache(_taken(h), count, offset, flags)


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Likewise: it may all be data."""
    if isinstance(h, StandbyDevice) and not h.has_come:
        return [(offset, count, 0)]
    return _core.extents(_taken(h), count, offset, flags)


CALLBACKS: Final[dict[str, Callable[..., Any]]] = {
    call.__name__: call for call in (pread, pwrite, flush, trim, zero, cache, extents)
}
