# SPDX-License-Identifier: BSD-3-Clause
"""What became of the guest that used a device last: whether a saved one may find its pages there.

A saved guest's memory refers to pages of its swap device as they were then. Once a guest has run on the device since,
they are others, and the saved one would read wrong pages without an error. So each device has a record, which
outlives the host.

Save files differ in the run of the guest that they end. The watch gives each run a name, which libvirt keeps in the
domain's XML, and so in the save file, and the record has that of the last one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from tmemd.system.replacing import replacing

DIRECTORY: Final = Path("/var/lib/tmemd/libvirt")

# 'unknown': it ended, and nobody could tell how; it may have been saved.
Guest: TypeAlias = Literal["running", "saved", "ended", "unknown"]


class RecordError(Exception):
    """A record that cannot be read."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one device."""

    domain: str  # its guest's UUID
    guest: Guest
    pages_lost: int = 0  # pages that the device had lost when its guest ended
    run: str = ""  # the name of that run; '': it was given none


class Records:
    """A directory of them, NAME.json each."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self._directory = directory

    def path(self, device: str) -> Path:
        """Where the record of a device is."""
        return self._directory / f"{device}.json"

    def read(self, device: str) -> Record | None:
        """A device's record; None: it has none. Raises RecordError."""
        try:
            return msgspec.json.decode(self.path(device).read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RecordError(f"{self.path(device)}: {error}") from None

    def write(self, device: str, record: Record) -> None:
        """Replace a device's record, whole and on disk when this returns."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self.path(device)) as fd:
            os.write(fd, msgspec.json.encode(record) + b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone for the length of a with block, among those who use this; reading and writing need it not."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def kept(self) -> list[str]:
        """Devices with pages of a guest that is saved, or may be. What cannot be read counts."""
        return sorted(path.stem for path in self._directory.glob("*.json") if self._is_kept(path.stem))

    def _is_kept(self, device: str) -> bool:
        try:
            record = self.read(device)
        except RecordError:
            return True
        return record is not None and record.guest in ("saved", "unknown")
