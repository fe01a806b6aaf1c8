# SPDX-License-Identifier: BSD-3-Clause
"""A disk with a volatile cache, for nbdkit's Python plugin: what was not flushed is gone when the process is killed.

  nbdkit python volatile.py file=FILE run=DIR [fua=no]

While DIR/hang is there no request is answered; the first write (at the offset that stands in it) that finds DIR/stall
takes it for DIR/stalled, and is not made while that is there; while DIR/fail is there each is an error; with DIR/size
the export has as many bytes as stand there; with DIR/synced nothing is volatile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import nbdkit

API_VERSION = 2
SECTOR = 512

_config: dict[str, str] = {}
_lock = threading.Lock()
_cache: dict[int, bytes] = {}  # sectors that were not flushed
_fd = -1


def config(key: str, value: str) -> None:
    _config[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    globals()["_fd"] = os.open(_config["file"], os.O_RDWR)


def _told(name: str) -> bool:
    return (Path(_config["run"]) / name).exists()


def _obey() -> None:
    while _told("hang"):
        time.sleep(0.005)
    if _told("fail"):
        raise OSError(errno.EIO, "told to fail")


def open(readonly: bool) -> int:  # noqa: A001, ARG001
    return 1


def get_size(h: int) -> int:  # noqa: ARG001
    path = Path(_config["run"]) / "size"
    return int(path.read_text()) if path.exists() else os.fstat(_fd).st_size


def can_fua(h: int) -> int:  # noqa: ARG001
    return int(nbdkit.FUA_NONE if _config.get("fua") == "no" else nbdkit.FUA_NATIVE)


def can_multi_conn(h: int) -> bool:  # noqa: ARG001
    return True


def pread(h: int, buf: bytearray, offset: int, flags: int) -> None:  # noqa: ARG001
    _obey()
    with _lock:
        first, last = offset // SECTOR * SECTOR, -(-(offset + len(buf)) // SECTOR) * SECTOR
        data = bytearray(os.pread(_fd, last - first, first).ljust(last - first, b"\0"))
        for at in range(first, last, SECTOR):
            if at in _cache:
                data[at - first : at - first + SECTOR] = _cache[at]
        buf[:] = data[offset - first : offset - first + len(buf)]


def _stall(offset: int) -> None:
    run = Path(_config["run"])
    with contextlib.suppress(OSError):
        if (run / "stall").read_text() not in ("", str(offset)):
            return
        (run / "stall").rename(run / "stalled")
        while _told("stalled"):
            time.sleep(0.005)


def pwrite(h: int, buf: bytes, offset: int, flags: int) -> None:  # noqa: ARG001
    _obey()
    _stall(offset)
    assert offset % SECTOR == len(buf) % SECTOR == 0
    with _lock:
        for at in range(0, len(buf), SECTOR):
            _cache[offset + at] = bytes(buf[at : at + SECTOR])
        if flags & nbdkit.FLAG_FUA or _told("synced"):
            _write_back(range(offset, offset + len(buf), SECTOR))


def zero(h: int, count: int, offset: int, flags: int) -> None:
    pwrite(h, bytes(count), offset, flags)


def flush(h: int, flags: int) -> None:  # noqa: ARG001
    _obey()
    with _lock:
        _write_back(list(_cache))


def _write_back(sectors: range | list[int]) -> None:
    for at in sectors:
        os.pwrite(_fd, _cache.pop(at), at)
