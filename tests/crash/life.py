# SPDX-License-Identifier: BSD-3-Clause
"""Opens a device as the plugin does, in this process, on a host whose boot id the test chooses.

Requests are calls of the core, or come by the virtio door.

As a program: has a process live each Birth that it is sent, which tells crash/recorder.c of each step how it ended, and
what was read. It ends with FAILED_TO_OPEN when the device cannot be opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
import traceback
import uuid
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from unittest.mock import patch

import nbd

from tests.crash.history import NEIGHBOURS, PAGES, Act, Step
from tests.crash.setting import Setting
from tests.support.content import PAGE
from tests.support.harness import MIB, Control
from tests.support.vhost.disk import SECTOR, Disk, Pending
from tmemd.binding import _core
from tmemd.device.config import MAX_LEASE
from tmemd.device.lease import Clock, Keeper
from tmemd.device.serve import ServedDevice, open_device
from tmemd.device.vhost import VhostDoor
from tmemd.store.poolfile import PoolError

FAILED_TO_OPEN = 3
PR_SET_PDEATHSIG = 1
FUA = 2  # nbdkit's flag
MOST_WRITES = 20  # beside one step
PATIENCE = 1e6  # seconds of the fast clock of recorder.c, with the virtio door


def open_life(setting: Setting, files: Path, pools: Path, boot: uuid.UUID, uri: str = "") -> ServedDevice:
    """The device whose local files are in *files*, on the host of that boot id; *uri*: of the server, if it is far.

    Its lease is as long as any life, and waits for nobody.
    """
    root = pools / "root"
    identity = root / "proc/sys/kernel/random/boot_id"
    identity.parent.mkdir(parents=True, exist_ok=True)
    identity.write_text(f"{boot}\n")
    with patch.object(Clock, "sleep", _skip), patch.object(Keeper, "start", lambda *_: None):
        return open_device(setting.config(files, pools, uri), root=root)


def _skip(clock: Clock, seconds: float) -> None:  # noqa: ARG001
    """As if more time had passed than any lease lasts."""
    before = clock.now()
    clock.now = lambda: before + MAX_LEASE  # type: ignore[method-assign]


def read_page(core: _core.Device, page: int) -> bytes | None:
    """What *page* is; None if it cannot be read."""
    data = bytearray(PAGE)
    try:
        _core.pread(core, data, page * PAGE, 0)
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017
        return None
    return bytes(data)


def read_pages(core: _core.Device) -> list[bytes | None]:
    """What all pages are."""
    pages: list[bytes | None] = []
    for first in PAGES[::NEIGHBOURS]:
        run = bytearray(NEIGHBOURS * PAGE)
        try:
            _core.pread(core, run, first * PAGE, 0)
            pages += [bytes(run[at : at + PAGE]) for at in range(0, len(run), PAGE)]
        except OSError:
            pages += [read_page(core, page) for page in range(first, first + NEIGHBOURS)]
    return pages


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


@dataclass(frozen=True)
class Birth:
    """What a process is to live."""

    setting: Setting
    files: Path
    pools: Path
    boot: uuid.UUID
    uri: str
    full: Path  # is there while there is no room on the disk
    look: bool  # read all pages first
    steps: list[Step]
    calls: int = -1  # the descriptor of a connection by which a server is sent away and called back

    def open(self) -> ServedDevice:
        """The device."""
        return open_life(self.setting, self.files, self.pools, self.boot, self.uri)


class Life:
    """A device in use."""

    def __init__(self, birth: Birth) -> None:
        self._birth = birth
        self._calls = Connection(birth.calls)
        self._recorder = ctypes.CDLL(None)
        self._disk: Disk | None = None
        self._sent: list[Pending] = []
        self._open()

    def _open(self) -> None:
        self._served = served = self._birth.open()
        if self._birth.setting.vhost:
            socket = self._birth.pools / "vhost.sock"
            self._recorder.record_threads(1)
            self._door = VhostDoor(socket, served.core, served.config, served.clients)
            self._door.start(print)
            if self._disk:
                self._disk.reconnect()
            else:
                self._disk = Disk(socket, deadline=PATIENCE)
            self._recorder.record_threads(0)

    def live(self) -> None:
        """Do one step after the other; those that fail, too, are done."""
        for page in PAGES if self._birth.look else []:
            self.look(page)
        self.mark(0, 0)
        for number, step in enumerate(self._birth.steps, 1):
            if step.act is Act.REATTACH:
                self._reattach(step)
            self.mark(number, self._error_of(step))

    def _error_of(self, step: Step) -> int:
        try:
            self._step(step)
        except OSError as error:
            return error.errno or errno.EIO
        except nbd.Error as error:
            return int(error.errnum)
        return 0

    def _reattach(self, step: Step) -> None:
        """As if it were a new process, while what a guest has sent by the virtio door is under way."""
        if self._disk:
            starts = range(0, len(step.data), PAGE)
            self._sent = [self._disk.submit_write(step.data[at : at + PAGE], step.offset + at) for at in starts]
        self._close_device()
        self._open()

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
        elif step.act in (Act.SERVER_GOES, Act.SERVER_COMES):
            self._calls.send(step.act)
            self._calls.recv()
        elif step.act in (Act.DISK_FULL, Act.DISK_FREED):
            self._fill(step.act is Act.DISK_FULL)
        elif step.act is Act.REATTACH:
            self._await_sent()
        elif step.act is Act.LOOK_AFTER:
            assert self._served.watch
            self._served.watch.look(lambda _: None)
        elif step.act in (Act.FLUSH, Act.DEMOTE, Act.DRAIN) and step.data:
            self._do_beside_writer(step)
        else:
            self._do(step)

    def _fill(self, full: bool) -> None:
        if full:
            self._birth.full.touch()
        else:
            self._birth.full.unlink(missing_ok=True)

    def _do(self, step: Step) -> None:
        if self._disk and step.act in (Act.WRITE, Act.PART, Act.TRIM, Act.ZERO, Act.FLUSH):
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
            case _:
                assert step.act is Act.DRAIN
                core.drain()

    def _do_beside_writer(self, step: Step) -> None:
        written, done = threading.Event(), threading.Event()
        failures = []

        def write() -> None:
            for _ in range(MOST_WRITES):
                try:
                    _core.pwrite(self._served.core, step.data, step.offset, 0)
                except OSError as error:
                    failures.append(error)
                written.set()
                if done.is_set():
                    break

        writer = threading.Thread(target=write)
        self._recorder.record_threads(1)
        writer.start()
        self._recorder.record_threads(0)
        written.wait()
        try:
            self._do(step)
        finally:
            done.set()
            writer.join()
        if failures:
            raise failures[-1]

    def _await_sent(self) -> None:
        """All of it, whatever fails."""
        failures = []
        while self._disk and self._sent:
            try:
                self._disk.wait(self._sent.pop())
            except nbd.Error as error:
                failures.append(error)
        if failures:
            raise failures[-1]

    def close(self) -> None:
        """End it."""
        if self._disk:
            self._disk.shutdown()
        self._close_device()

    def _close_device(self) -> None:
        if self._disk:
            self._door.close()
            del self._door
        self._served.close()
        del self._served  # what is mapped keeps the lock of its file


def _end(birth: Birth) -> int:
    """Live it all; returns the exit status."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        life = Life(birth)
        life.live()
        life.close()
    except PoolError as error:
        print(f"life: {error}", file=sys.stderr)
        return FAILED_TO_OPEN
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Fork a process for each Birth that comes by the connection of that descriptor, with its calls and environment.

    Tells its number, and its exit status when it has ended; its number is free when somebody has said so.
    """
    asks = Connection(int(sys.argv[1]))
    while True:
        try:
            birth, environment = asks.recv()
        except EOFError:
            return
        calls = recv_handle(asks)
        pid = os.fork()
        if not pid:
            asks.close()
            os.environ.update(environment)
            os._exit(_end(replace(birth, calls=calls)))
        os.close(calls)
        asks.send(pid)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended
        asks.send(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        asks.recv()
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
