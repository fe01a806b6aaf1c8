# SPDX-License-Identifier: BSD-3-Clause
"""The save file: a device's pages as a stream, which is written and read from its start to its end.

A header, one record for each page or run of pages, in order, and a last record with counts and a checksum over all
before it. docs/save-format.md has the layout. Formats of pools may differ where a device is saved and restored: this
one is read by every later version.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from io import BufferedIOBase, RawIOBase
from typing import Annotated, Final, TypeAlias
from uuid import UUID

import msgspec
from crc32c import crc32c

from tmemd.binding import _core
from tmemd.store.poolfile import AWAY, NAME_PATTERN, AwayError, PoolError

MAGIC: Final = b"TMEMSAVE"
VERSION: Final = 1
END: Final = 32  # the encoding of the last record
_START: Final = struct.Struct("<8sII")  # magic, version, bytes of the description
_CRC: Final = struct.Struct("<I")
_HEAD: Final = struct.Struct("<IIHH")  # of a record: page, CRC, payload length, encoding
_SEALED: Final = struct.Struct("<IHH")  # what of it the CRC covers, before the payload
_COUNTS: Final = struct.Struct("<QQQI")
MAX_SIZE: Final = 1 << 44
_MAX_DESCRIPTION: Final = 64 << 10
_CHUNK: Final = 4 << 20

Progress: TypeAlias = Callable[[int, int | None], None]  # how much is done, and of how much (None: not known)


class SaveHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Which device a save file is of, and how it was when it was saved. What it does not know a reader ignores."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]  # of the device, in bytes
    uuid: UUID
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    changes: Annotated[int, msgspec.Meta(ge=0)]  # requests that changed it in this epoch
    whole: bool  # it has all pages; else it goes along with the backing file
    written_by: str  # version of tmemd

    @property
    def pages(self) -> int:
        """Of the device."""
        return -(-self.size // _core.PAGE)

    def pack(self) -> bytes:
        """As the file begins."""
        description = msgspec.json.encode(self)
        body = _START.pack(MAGIC, VERSION, len(description)) + description
        return body + _CRC.pack(crc32c(body))


class Counts(msgspec.Struct, frozen=True):
    """What a save file says of itself at its end."""

    records: int
    pages: int  # with their content
    lost: int  # pages whose reads are errors


def _pack_end(counts: Counts, crc: int) -> bytes:
    payload = _COUNTS.pack(counts.records, counts.pages, counts.lost, crc)
    sealed = crc32c(_SEALED.pack(0, len(payload), END) + payload)
    return _HEAD.pack(0, sealed, len(payload), END) + payload


def write(core: _core.Device, header: SaveHeader, file: RawIOBase, progress: Progress) -> tuple[Counts, int, int]:
    """Write a whole save file; returns its counts, and how many pages were found damaged and the first of them.

    Nobody else uses the device meanwhile. Raises PoolError, which names the page; OSError, of the file.
    """
    start = header.pack()
    _write_all(file, start)
    saving = _core.Saving(core, whole=header.whole, crc=crc32c(start))
    buffer = memoryview(bytearray(_CHUNK))
    while used := _fill(saving, buffer):
        _write_all(file, buffer[:used])
        progress(saving.page, header.pages)
    counts = Counts(saving.records, saving.pages, saving.lost)
    _write_all(file, _pack_end(counts, saving.crc))
    return counts, saving.damaged, saving.first_damaged


def _failure(what: str, error: OSError, hint: str = "") -> PoolError:
    if error.errno in AWAY:
        return AwayError(f"{what}: {AWAY[error.errno]}")
    return PoolError(f"{what}: {error.strerror}{hint}")


def _fill(saving: _core.Saving, buffer: memoryview) -> int:
    try:
        return saving.fill(buffer)
    except OSError as error:
        raise _failure(f"page {saving.page} cannot be read", error) from None


def _write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]


class Reader:
    """A save file that is read from its start; all errors are PoolErrors that name it, and the page they are about."""

    def __init__(self, file: RawIOBase | BufferedIOBase, where: str) -> None:
        """Read the header."""
        self._file = file
        self._where = where
        start = self._exactly(_START.size)
        magic, version, length = _START.unpack(start)
        if magic != MAGIC:
            raise PoolError(f"{where} is no save file of tmemctl")
        if version > VERSION:
            raise PoolError(f"{where}: version {version} of the save file; this tmemctl reads up to version {VERSION}")
        if length > _MAX_DESCRIPTION:
            raise PoolError(f"{where} is damaged: its header cannot be that long")
        rest = self._exactly(length + _CRC.size)
        body = start + rest[: -_CRC.size]
        if _CRC.unpack(rest[-_CRC.size :])[0] != crc32c(body):
            raise PoolError(f"{where} is damaged: its header has a wrong checksum")
        try:
            self.header = msgspec.json.decode(rest[: -_CRC.size], type=SaveHeader)
        except msgspec.MsgspecError as error:
            raise PoolError(f"{where}: its header says nothing that can be understood: {error}") from None
        self._crc = crc32c(body + rest[-_CRC.size :])
        self._begun = len(start) + len(rest)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise PoolError(f"{self._where} is truncated: it ends inside its header")
            data += part
        return data

    def run(self, core: _core.Device | None, progress: Progress) -> Counts:
        """Check everything up to the end of the file, and put it into a device, if there is one, that was made anew."""
        restoring = _core.Restoring(core, pages=self.header.pages, crc=self._crc)
        buffer = memoryview(bytearray(_CHUNK))
        have = 0
        while True:
            read = self._read_into(buffer[have:])
            have += read
            used = self._take(restoring, buffer[:have])
            rest = bytes(buffer[used:have])
            have = len(rest)
            buffer[:have] = rest
            progress(self._begun + restoring.taken, None)
            if restoring.ended:
                return self._end(restoring, rest)
            if not read:
                raise PoolError(
                    f"{self._where} is truncated: it ends after {self._begun + restoring.taken + have} bytes, before"
                    f" page {restoring.page} of {self.header.pages}"
                )

    def _read_into(self, buffer: memoryview) -> int:
        try:
            return self._file.readinto(buffer) or 0
        except OSError as error:
            raise PoolError(f"{self._where} cannot be read: {error.strerror}") from None

    def _take(self, restoring: _core.Restoring, data: memoryview) -> int:
        try:
            return restoring.take(data)
        except OSError as error:
            page, at = restoring.page, self._begun + restoring.taken
            if error.errno == errno.EBADMSG:
                raise PoolError(f"{self._where} is damaged at page {page}, in the record at byte {at}") from None
            what = f"page {page} cannot be restored"
            if error.errno == errno.ENOTSUP:
                reason = "it was lost, and a device without a backing file cannot keep that in mind"
                raise PoolError(f"{what}: {reason}") from None
            raise _failure(what, error, ": give the pool more room, or a backing file") from None

    def _end(self, restoring: _core.Restoring, rest: bytes) -> Counts:
        size = _HEAD.size + _COUNTS.size
        while len(rest) <= size and (more := self._file.read(size + 1 - len(rest))):
            rest += more
        if len(rest) < size:
            raise PoolError(f"{self._where} is truncated: it ends inside its last record")
        records, pages, lost, crc = _COUNTS.unpack_from(rest, _HEAD.size)
        counts = Counts(records, pages, lost)
        if rest[:size] != _pack_end(counts, crc):
            raise PoolError(f"{self._where} is damaged: its last record has a wrong checksum")
        if crc != restoring.crc or records != restoring.records:
            raise PoolError(f"{self._where} is damaged: it has records that are not those that were saved")
        if len(rest) > size:
            raise PoolError(f"{self._where} is damaged: something follows its last record")
        return counts


def size_of(fd: int) -> int | None:
    """Bytes of a file that can be read twice; None of a pipe or the like."""
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
        return os.fstat(fd).st_size
    except OSError:
        return None


def describe(fd: int, where: str) -> tuple[SaveHeader, Counts]:
    """What a save file says of itself at either end; what lies between is not read. Raises PoolError."""
    size = _HEAD.size + _COUNTS.size
    with open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        header = Reader(file, where).header
        file.seek(max(os.fstat(fd).st_size - size, 0))
        end = file.read(size)
    records, pages, lost, crc = _COUNTS.unpack(end[_HEAD.size :])
    counts = Counts(records, pages, lost)
    if end != _pack_end(counts, crc):
        raise PoolError(f"{where} has no last record")
    return header, counts
