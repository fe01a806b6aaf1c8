# SPDX-License-Identifier: BSD-3-Clause
"""What a disk may hold after the host died: replays a record of crash/recorder.c up to any moment.

What was written before the last sync of its file is there; of what came later any part may be missing. Whole writes
and single sectors of them go missing, as disks do both. After a sync that failed no later one makes up for what is
missing by then, although reads show it until the page cache lets go of it.
"""

from __future__ import annotations

import enum
import fcntl
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

SECTOR = 512
_ENTRY = struct.Struct("<IIQQ")

Survives = Callable[[], bool]


class Operation(enum.IntEnum):
    """As in recorder.c."""

    MARK = 0
    WRITE = 1
    SYNC = 2
    TRUNCATE = 3
    PUNCH = 4
    ALLOCATE = 5
    FOUND = 6
    TORN = 7
    SYNC_FAILED = 8
    RENAME = 9
    SENT = 10
    AWAY = 11  # a server goes, or hangs
    BACK = 12  # and is there again; this and the next a world notes itself
    FORGOT = 13  # the file's host died: this is what the file is now
    HELD = 14  # a change of the file is held back
    LATE = 15  # it is made: the next entry


_WITH_DATA = {Operation.WRITE, Operation.FOUND, Operation.RENAME, Operation.FORGOT}
_CHANGES = {Operation.WRITE, Operation.TRUNCATE, Operation.PUNCH, Operation.ALLOCATE}


@dataclass(frozen=True)
class Entry:
    """One operation of the record."""

    operation: Operation
    path: Path
    offset: int
    length: int
    data: bytes


@contextmanager
def locked(record: Path) -> Iterator[BinaryIO]:
    """The record, to which nobody adds for the length of a with block."""
    with record.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def append(record: Path, operation: Operation, path: Path = Path(), data: bytes = b"") -> None:
    """Note that something happened."""
    name = str(path).encode()
    with locked(record) as file:
        file.write(_ENTRY.pack(operation, len(name), 0, len(data)) + name + data)


def read(record: Path) -> list[Entry]:
    """What happened so far."""
    with locked(record) as file:
        file.seek(0)
        return list(parse(file.read()))


@cache
def _path(name: bytes) -> Path:
    return Path(name.decode())


def parse(record: bytes) -> Iterator[Entry]:
    """The operations of a record, in order."""
    at = 0
    while at < len(record):
        number, path_length, offset, length = _ENTRY.unpack_from(record, at)
        at += _ENTRY.size
        path = _path(record[at : at + path_length])
        at += path_length
        operation = Operation(number)
        data = record[at : at + length] if operation in _WITH_DATA else b""
        at += len(data)
        yield Entry(operation, path, offset, length, data)


@dataclass
class File:
    """A file's size and its sectors that are not zeros."""

    size: int = 0
    sectors: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def read_from(cls, path: Path) -> File:
        """What a file is now."""
        file = cls(path.stat().st_size)
        with path.open("rb") as real:
            for sector in range(-(-file.size // SECTOR)):
                if (data := real.read(SECTOR)).strip(b"\0"):
                    file.sectors[sector] = data.ljust(SECTOR, b"\0")
        return file

    def copy(self) -> File:
        """Another one like it."""
        return File(self.size, dict(self.sectors))

    def apply(self, entry: Entry, survives: Survives) -> None:
        """Do what *entry* says, as far as it survives; sectors are asked for one by one."""
        if entry.operation is Operation.TRUNCATE:
            self.size = entry.length
            for sector in [n for n in self.sectors if n * SECTOR >= self.size]:
                del self.sectors[sector]
            return
        end = entry.offset + entry.length
        self.size = max(self.size, end)
        touched = range(entry.offset // SECTOR, -(-end // SECTOR))
        if entry.operation is Operation.WRITE:
            sectors: Iterable[int] = touched
        elif entry.operation is Operation.PUNCH:  # most of it may be where there is nothing
            few, many = sorted([touched, self.sectors], key=len)
            sectors = [n for n in few if n in many]
        else:
            return
        for sector in sectors:
            if survives():
                self._put(sector, entry)

    def _put(self, sector: int, entry: Entry) -> None:
        start = sector * SECTOR
        first, last = max(entry.offset - start, 0), min(entry.offset + entry.length - start, SECTOR)
        old = self.sectors.pop(sector, bytes(SECTOR))
        piece = entry.data[start + first - entry.offset : start + last - entry.offset] or bytes(last - first)
        new = old[:first] + piece + old[last:]
        if new.strip(b"\0"):
            self.sectors[sector] = new

    def write_to(self, path: Path, reserved: range = range(0)) -> None:
        """Make a sparse file of it, closed to others as ours are. The *reserved* bytes have blocks even if zeros."""
        path.touch(0o600)
        with path.open("wb") as file:
            file.truncate(self.size)
            os.pwrite(file.fileno(), bytes(len(reserved)), reserved.start)
            for start, data in self._runs():
                file.seek(start)
                file.write(data[: max(0, self.size - start)])

    def _runs(self) -> Iterator[tuple[int, bytes]]:
        """Neighbouring sectors, with where they start."""
        numbers = sorted(self.sectors)
        for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
            sectors = [number for _, number in run]
            yield sectors[0] * SECTOR, b"".join(map(self.sectors.__getitem__, sectors))


class Disk:
    """The files of a record while it is replayed: what is safe of each, and what was written since its last sync."""

    def __init__(self, rng: random.Random, files: dict[Path, File] | None = None) -> None:
        self._rng = rng
        self._safe = {path: file.copy() for path, file in (files or {}).items()}
        self._unsynced: dict[Path, list[Entry]] = {}

    def copy(self) -> Disk:
        """Another one like it."""
        other = Disk(self._rng, self._safe)
        other._unsynced = {path: list(entries) for path, entries in self._unsynced.items()}
        return other

    def step(self, entry: Entry) -> None:
        """Go on by one operation."""
        if entry.operation is Operation.FORGOT:
            self._safe[entry.path] = pickle.loads(entry.data)
            self._unsynced.pop(entry.path, None)
        elif entry.operation in (Operation.SYNC, Operation.SYNC_FAILED):
            file = self._safe.setdefault(entry.path, File())
            for late in self._unsynced.pop(entry.path, []):
                file.apply(late, self._some() if entry.operation is Operation.SYNC_FAILED else _all)
        elif entry.operation is Operation.RENAME:  # as if its directory were synced at once
            new = Path(entry.data.decode())
            self._safe[new] = self._safe.pop(entry.path)
            self._unsynced[new] = self._unsynced.pop(entry.path, [])
        elif entry.operation in _CHANGES:
            self._unsynced.setdefault(entry.path, []).append(entry)

    def _some(self) -> Survives:
        share = self._rng.choice([0.0, 0.5, 1.0])
        return lambda: self._rng.random() < share

    def after_death(self, dies: Callable[[Path], bool] = lambda _: True) -> dict[Path, File]:
        """The files as disks may have them if the hosts of those die now for which *dies* says so."""
        return self._with_unsynced(lambda path: self._some() if dies(path) else _all)

    def evicted(self) -> dict[Path, File]:
        """The files as they are read once the page cache has let go of all that it need not write."""
        return self._with_unsynced(lambda _: _all)

    def lose(self, dies: Callable[[Path], bool]) -> dict[Path, File]:
        """Such hosts die: what these files are now."""
        left = {path: file for path, file in self.after_death(dies).items() if dies(path)}
        for path, file in left.items():
            self._safe[path] = file.copy()
            self._unsynced.pop(path, None)
        return left

    def _with_unsynced(self, survives: Callable[[Path], Survives]) -> dict[Path, File]:
        files = {path: file.copy() for path, file in self._safe.items()}
        for path, entries in self._unsynced.items():
            file = files.setdefault(path, File())
            for entry in entries:
                file.apply(entry, survives(path))
        return files


def _all() -> bool:
    return True
