"""Opens a device as the plugin does, in this process, on a host whose boot id the test chooses.

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
from pathlib import Path

from tests.crash.history import PAGES, SIZE, Act, Step
from tests.support.content import PAGE
from tests.support.harness import MIB, Control
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import ServedDevice, open_device
from tmemd.store.poolfile import PoolError

FAILED_TO_OPEN = 3
FUA = 2  # nbdkit's flag


def open_life(
    files: Path, pools: Path, boot: uuid.UUID, *, durable: bool = False, lost_zero: bool = False
) -> ServedDevice:
    """The device whose backing file and map are in *files*, on the host of that boot id."""
    root = pools / "root"
    identity = root / "proc/sys/kernel/random/boot_id"
    identity.parent.mkdir(parents=True, exist_ok=True)
    identity.write_text(f"{boot}\n")
    config = DeviceConfig(
        "life", SIZE, files / "backing", 8 * MIB, pools, durable=durable, lost_zero=lost_zero, reserve=False
    )
    return open_device(config, root=root)


def read_page(core: _core.Device, page: int) -> bytes | None:
    """What *page* is; None if it cannot be read."""
    data = bytearray(PAGE)
    try:
        _core.pread(core, data, page * PAGE, 0)
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017
        return None
    return bytes(data)


class Life:
    """A device in use."""

    def __init__(self, files: Path, pools: Path, boot: uuid.UUID, *, durable: bool, lost_zero: bool) -> None:
        self._files, self._pools, self._boot, self._durable, self._lost_zero = files, pools, boot, durable, lost_zero
        self._recorder = ctypes.CDLL(None)
        self._open()

    def _open(self) -> None:
        self._served = open_life(self._files, self._pools, self._boot, durable=self._durable, lost_zero=self._lost_zero)

    def live(self, steps: list[Step]) -> None:
        """Do one step after the other; those that fail, too, are done."""
        self.mark(0, 0)
        for number, step in enumerate(steps, 1):
            if step.act is Act.REATTACH:
                self._served.close()
                self._open()
            self.mark(number, self._error_of(step))

    def _error_of(self, step: Step) -> int:
        try:
            self._step(step)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def mark(self, number: int, failed: int) -> None:
        """Record that this step is done; 0 is to have opened."""
        self._recorder.record_mark(ctypes.c_uint64(number), ctypes.c_uint64(failed))

    def look(self, page: int) -> None:
        """Read a page and record what it was."""
        data = read_page(self._served.core, page) or b""
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
            _core.flush(core, 0)
        finally:
            flushed.set()
            writer.join()

    def close(self) -> None:
        """End it."""
        self._served.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("pools", type=Path)
    parser.add_argument("boot", type=uuid.UUID)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--lost-zero", action="store_true")
    parser.add_argument("--look", action="store_true", help="read all pages first")
    args = parser.parse_args()
    steps: list[Step] = pickle.load(sys.stdin.buffer)
    try:
        life = Life(args.files, args.pools, args.boot, durable=args.durable, lost_zero=args.lost_zero)
        for page in PAGES if args.look else []:
            life.look(page)
        life.live(steps)
    except PoolError as error:
        print(f"life: {error}", file=sys.stderr)
        sys.exit(FAILED_TO_OPEN)
    life.close()


if __name__ == "__main__":
    main()
