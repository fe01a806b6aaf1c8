# SPDX-License-Identifier: BSD-3-Clause
"""Opens a device as the plugin does, in this process, on a host whose boot id the test chooses.

Requests are calls of the core, or come by the virtio door.

As a program: lives the steps (tests/crash/history.py) that it reads from its input, and tells crash/recorder.c of each
step how it ended, and what was read. It ends with FAILED_TO_OPEN when the device cannot be opened.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import pickle
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import nbd

from tests.crash.history import PAGES, SIZE, Act, Step
from tests.support.content import PAGE
from tests.support.harness import MIB, Control
from tests.support.vhost.disk import SECTOR, Disk
from tmemd.binding import _core
from tmemd.device.config import MAX_LEASE, DeviceConfig
from tmemd.device.lease import Clock, Keeper
from tmemd.device.serve import ServedDevice, open_device
from tmemd.device.vhost import VhostDoor
from tmemd.store.poolfile import PoolError

FAILED_TO_OPEN = 3
FUA = 2  # nbdkit's flag


def open_life(
    files: Path, pools: Path, boot: uuid.UUID, *, durable: bool = False, lost_zero: bool = False, inside: bool = False
) -> ServedDevice:
    """The device whose backing file and map are in *files*, on the host of that boot id.

    *inside*: the map is in the file's tail. Its lease is as long as any life, and waits for nobody.
    """
    root = pools / "root"
    identity = root / "proc/sys/kernel/random/boot_id"
    identity.parent.mkdir(parents=True, exist_ok=True)
    identity.write_text(f"{boot}\n")
    config = DeviceConfig(
        "life", SIZE, files / "backing", 8 * MIB, pools, durable=durable, lost_zero=lost_zero, reserve=False,
        inside=inside, lease=MAX_LEASE,
    )  # fmt: skip
    with patch.object(Clock, "sleep", _skip), patch.object(Keeper, "start", lambda *_: None):
        return open_device(config, root=root)


def _skip(clock: Clock, seconds: float) -> None:
    """As if the time had passed."""
    before = clock.now()
    clock.now = lambda: before + seconds  # type: ignore[method-assign]


def read_page(core: _core.Device, page: int) -> bytes | None:
    """What *page* is; None if it cannot be read."""
    data = bytearray(PAGE)
    try:
        _core.pread(core, data, page * PAGE, 0)
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017
        return None
    return bytes(data)


def read_from_disk(disk: Disk, page: int) -> bytes | None:
    """The same through the virtio door."""
    try:
        return disk.pread(PAGE, page * PAGE)
    except nbd.Error as error:
        assert error.errnum == errno.EIO  # noqa: PT017
        return None


def request_of_disk(disk: Disk, step: Step) -> None:
    """Do a step through the virtio door. What begins within a sector is the whole of it, as a guest's kernel has it."""
    flags = nbd.CMD_FLAG_FUA if step.fua else 0
    match step.act:
        case Act.TRIM:
            disk.trim(step.length, step.offset, flags)
        case Act.ZERO:
            disk.zero(step.length, step.offset, flags)
        case Act.FLUSH:
            disk.flush()
        case _:
            before = step.offset % SECTOR
            start = disk.pread(SECTOR, step.offset - before)[:before] if before else b""
            disk.pwrite(start + step.data, step.offset - before, flags)


class Life:
    """A device in use."""

    def __init__(self, open_it: Callable[[], ServedDevice], *, vhost: Path | None) -> None:
        """*vhost*: the socket of the virtio door, if requests are to come by that."""
        self._open_it, self._vhost = open_it, vhost
        self._recorder = ctypes.CDLL(None)
        self._open()

    def _open(self) -> None:
        self._served = served = self._open_it()
        self._disk: Disk | None = None
        if self._vhost:
            self._recorder.record_threads(1)
            self._door = VhostDoor(self._vhost, served.core, served.config, served.clients)
            self._door.start(print)
            self._disk = Disk(self._vhost)
            self._recorder.record_threads(0)

    def live(self, steps: list[Step]) -> None:
        """Do one step after the other; those that fail, too, are done."""
        self.mark(0, 0)
        for number, step in enumerate(steps, 1):
            if step.act is Act.REATTACH:
                self.close()
                self._open()
            self.mark(number, self._error_of(step))

    def _error_of(self, step: Step) -> int:
        try:
            self._step(step)
        except OSError as error:
            return error.errno or errno.EIO
        except nbd.Error as error:
            return int(error.errnum)
        return 0

    def mark(self, number: int, failed: int) -> None:
        """Record that this step is done; 0 is to have opened."""
        self._recorder.record_mark(ctypes.c_uint64(number), ctypes.c_uint64(failed))

    def look(self, page: int) -> None:
        """Read a page and record what it was."""
        data = (read_from_disk(self._disk, page) if self._disk else read_page(self._served.core, page)) or b""
        self._recorder.record_found(ctypes.c_uint64(page), data, ctypes.c_uint64(len(data)))

    def _step(self, step: Step) -> None:
        if step.act in (Act.FREEZE, Act.THAW):
            with Control(self._served.pool_path) as control:
                control.frozen(step.act is Act.FREEZE)
        elif step.act is Act.READ:
            for page in step.pages:
                self.look(page)
        elif step.act is Act.FLUSH and step.data:
            self._flush_while_writing(self._served.core, step)
        elif self._disk and step.act in (Act.WRITE, Act.PART, Act.TRIM, Act.ZERO, Act.FLUSH):
            request_of_disk(self._disk, step)
        else:
            self._request(self._served.core, step)

    def _request(self, core: _core.Device, step: Step) -> None:
        flags = FUA if step.fua else 0
        match step.act:
            case Act.WRITE | Act.PART:
                _core.pwrite(core, step.data, step.offset, flags)
            case Act.TRIM:
                _core.trim(core, step.length, step.offset, flags)
            case Act.ZERO:
                _core.zero(core, step.length, step.offset, flags)
            case Act.CACHE:
                _core.cache(core, step.length, step.offset, 0)
            case Act.FLUSH:
                _core.flush(core, 0)
            case Act.DEMOTE:
                core.demote(MIB)
            case Act.DRAIN:
                core.drain()
            case _:
                assert step.act is Act.REATTACH

    def _flush_while_writing(self, core: _core.Device, step: Step) -> None:
        written, flushed = threading.Event(), threading.Event()

        def write() -> None:
            last = False
            while not last:
                last = flushed.is_set()
                _core.pwrite(core, step.data, step.offset, 0)
                written.set()

        writer = threading.Thread(target=write)
        writer.start()
        written.wait()
        try:
            if self._disk:
                self._disk.flush()
            else:
                _core.flush(core, 0)
        finally:
            flushed.set()
            writer.join()

    def close(self) -> None:
        """End it."""
        if self._disk:
            self._disk.shutdown()
            self._door.close()
        self._served.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("pools", type=Path)
    parser.add_argument("boot", type=uuid.UUID)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--lost-zero", action="store_true")
    parser.add_argument("--inside", action="store_true", help="have the map in the file's tail")
    parser.add_argument("--vhost", action="store_true", help="let requests come by the virtio door")
    parser.add_argument("--look", action="store_true", help="read all pages first")
    args = parser.parse_args()
    steps: list[Step] = pickle.load(sys.stdin.buffer)
    try:
        open_it = partial(
            open_life,
            args.files,
            args.pools,
            args.boot,
            durable=args.durable,
            lost_zero=args.lost_zero,
            inside=args.inside,
        )
        life = Life(open_it, vhost=args.pools / "vhost.sock" if args.vhost else None)
        for page in PAGES if args.look else []:
            life.look(page)
        life.live(steps)
    except PoolError as error:
        print(f"life: {error}", file=sys.stderr)
        sys.exit(FAILED_TO_OPEN)
    life.close()


if __name__ == "__main__":
    main()
