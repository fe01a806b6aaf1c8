# SPDX-License-Identifier: BSD-3-Clause
"""A host with one device, in this process, and what is done to it there: used, saved, restored."""

from __future__ import annotations

import itertools
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.content import PAGE, content
from tests.support.harness import MIB
from tests.support.reference import Reference
from tmemd.binding import _core
from tmemd.cli import main
from tmemd.device.config import DeviceConfig
from tmemd.device.parts import Parts
from tmemd.device.serve import open_device
from tmemd.store import savefile
from tmemd.store.savefile import Reader

PAGES = 1024
SIZE = PAGES * PAGE - 2048  # the last page ends early
LIMIT = _core.layout(SIZE).minimum_bytes + MIB // 2  # some pages are in the file


class Host:
    """Its device is `web`."""

    def __init__(self, pools: Path, disk: Path | None, limit: int = LIMIT) -> None:
        pools.mkdir(exist_ok=True)
        self.pools = pools
        self.pool = pools / "web.pool"
        self.config = DeviceConfig("web", SIZE, disk, limit, pools, reserve=False)

    @contextmanager
    def device(self) -> Iterator[_core.Device]:
        """The device, open."""
        with closing(open_device(self.config)) as served:
            yield served.core

    def begin(self) -> None:
        """Start the device once, and stop it."""
        with self.device():
            pass

    def durable(self, durable: bool = True) -> None:
        """From now on it is opened so."""
        self.config = replace(self.config, durable=durable)

    def lose_pool(self) -> None:
        """What was in RAM goes, as with a reboot."""
        self.pool.unlink()

    def ctl(self, *command: str) -> int:
        """tmemctl's exit status."""
        return main([*command, f"--pools={self.pools}"])

    def content(self) -> bytes:
        """All of the device. Raises OSError where a page cannot be read, PoolError where it cannot be opened."""
        with self.device() as core:
            return read(core, 0, SIZE)


def read(core: _core.Device, offset: int, length: int) -> bytes:
    """One read request."""
    buffer = bytearray(length)
    _core.pread(core, buffer, offset, 0)
    return bytes(buffer)


def fill(core: _core.Device, seed: int = 1, writes: int = 900) -> Reference:
    """Write, overwrite and trim here and there; returns what the device is then."""
    rng, truth = random.Random(seed), Reference(SIZE)
    for version in range(1, writes):
        offset = rng.randrange(PAGES - 1) * PAGE + rng.choice((0, 0, 0, 512))
        data = b"".join(content(offset // PAGE + i, version) for i in range(rng.choice((1, 1, 2, 6))))
        data = data[: SIZE - offset]
        if rng.random() < 0.1:
            _core.zero(core, len(data), offset, 0)
            data = bytes(len(data))
        else:
            _core.pwrite(core, data, offset, 0)
        truth.write(offset, data)
    return truth


# What changes something outside the process, or takes a while in the core.
_CALLS = "open", "write", "pwrite", "ftruncate", "truncate", "posix_fallocate", "fsync", "rename", "unlink"
STEPS: list[tuple[Any, str]] = [(os, name) for name in _CALLS]
STEPS += [(savefile, "_fill"), (savefile, "_write_all"), (Reader, "_take"), (Reader, "_end"), (Parts, "open_core")]


def killed_at(step: int, act: Callable[[], Any]) -> bool:
    """Do *act* in a process that is killed before its step of that number; False: it ended before."""
    return _was_killed(lambda: _kill_before(step), act)


def killed_after(seconds: float, act: Callable[[], Any]) -> bool:
    """The same, killed after so many seconds."""

    def prepare() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return _was_killed(prepare, act)


def _was_killed(prepare: Callable[[], object], act: Callable[[], Any]) -> bool:
    child = os.fork()
    if not child:
        status = 1
        try:
            prepare()
            status = act() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_before(step: int) -> None:
    left = itertools.count(step, -1)

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def killing(*arguments: Any, **keywords: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return killing

    for owner, name in STEPS:
        setattr(owner, name, wrapped(getattr(owner, name)))
