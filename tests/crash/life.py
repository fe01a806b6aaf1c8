"""Opens a device as the plugin does, in this process, on a host whose boot id the test chooses.

As a program: lives a history (tests/crash/history.py) and, for crash/recorder.c, marks each step that is done.
"""

from __future__ import annotations

import argparse
import ctypes
import uuid
from pathlib import Path

from tests.crash.history import SIZE, Act, Step, history
from tests.harness import MIB, Control
from tmemd.core import _core
from tmemd.device.served import DeviceConfig, ServedDevice, open_device


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


class Life:
    """A device in use."""

    def __init__(self, files: Path, pools: Path, boot: uuid.UUID, *, durable: bool) -> None:
        self._files, self._pools, self._boot, self._durable = files, pools, boot, durable
        self._open()

    def _open(self) -> None:
        self._served = open_life(self._files, self._pools, self._boot, durable=self._durable)

    def step(self, step: Step) -> None:
        """Do one step."""
        if step.act is Act.REATTACH:
            self._served.close()
            self._open()
        elif step.act in (Act.FREEZE, Act.THAW):
            with Control(self._served.pool_path) as control:
                control.frozen(step.act is Act.FREEZE)
        else:
            self._request(self._served.core, step)

    def _request(self, core: _core.Device, step: Step) -> None:
        match step.act:
            case Act.WRITE | Act.PART:
                _core.pwrite(core, step.data, step.offset, 0)
            case Act.TRIM:
                _core.trim(core, step.length, step.offset, 0)
            case Act.ZERO:
                _core.zero(core, step.length, step.offset, 0)
            case Act.CACHE:
                _core.cache(core, step.length, step.offset, 0)
            case Act.FLUSH:
                _core.flush(core, 0)
            case Act.DEMOTE:
                core.demote(MIB)
            case Act.DRAIN:
                core.drain()
            case _:
                raise AssertionError(step.act)

    def close(self) -> None:
        """End it."""
        self._served.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("pools", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--whole-pages", action="store_true")
    args = parser.parse_args()
    mark = ctypes.CDLL(None).record_mark
    life = Life(args.files, args.pools, uuid.uuid4(), durable=args.durable)
    mark(ctypes.c_uint64(0))
    for number, step in enumerate(history(args.seed, args.steps, parts=not args.whole_pages), 1):
        life.step(step)
        mark(ctypes.c_uint64(number))
    life.close()


if __name__ == "__main__":
    main()
