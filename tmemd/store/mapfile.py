"""The map's header: which device a backing file holds, and which pool was last in use with it.

The bits behind it, one for each granule, are the page path's (tmemd/core/map.h); docs/pool-format.md has the layout.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import google_crc32c

MAGIC: Final = b"TMEMMAP1"
VERSION: Final = 1
BITS_OFFSET: Final = 4096
GRANULE: Final = 32 << 20
_HEADER: Final = struct.Struct("<8sIIQQ16s16sQ")
_CRC: Final = struct.Struct("<I")


class MapError(Exception):
    """A map cannot be used; the message says which one, why, and what to do."""


@dataclass(frozen=True)
class MapHeader:
    """The header of a map: sizes in bytes, and the generation and boot of the pool that was last in use with it."""

    size: int
    granule: int
    uuid: UUID
    boot_id: UUID
    generation: int

    @property
    def granules(self) -> int:
        """Granules of the device: bits of the map."""
        return -(-self.size // self.granule)

    @property
    def file_bytes(self) -> int:
        """The length of the whole map."""
        return BITS_OFFSET + -(-self.granules // 8)

    def pack(self) -> bytes:
        """The header, 4096 bytes, checksum included."""
        body = _HEADER.pack(
            MAGIC, VERSION, 0, self.size, self.granule, self.uuid.bytes, self.boot_id.bytes, self.generation
        )
        return (body + _CRC.pack(google_crc32c.value(body))).ljust(BITS_OFFSET, b"\0")

    @classmethod
    def unpack(cls, data: bytes, where: Path | str) -> MapHeader:
        """Read a header; raises MapError, naming *where*, for anything but a whole map of this version."""
        if len(data) < _HEADER.size + _CRC.size or data[:8] != MAGIC:
            raise MapError(f"{where}: not a tmem map")
        body = data[: _HEADER.size]
        _, version, _, size, granule, uid, boot, generation = _HEADER.unpack(body)
        if version != VERSION:
            raise MapError(f"{where}: map format version {version}, this tmemd reads version {VERSION}")
        if _CRC.unpack_from(data, _HEADER.size)[0] != google_crc32c.value(body):
            raise MapError(f"{where}: the map's header is damaged (checksum mismatch)")
        if not size or not granule or granule % BITS_OFFSET:
            raise MapError(f"{where}: the map's header contradicts itself")
        return cls(size, granule, UUID(bytes=uid), UUID(bytes=boot), generation)


def read_header(fd: int, where: Path | str) -> MapHeader:
    """The header of the map behind *fd*, whose length is checked too. Raises MapError."""
    header = MapHeader.unpack(os.pread(fd, BITS_OFFSET, 0), where)
    if os.fstat(fd).st_size < header.file_bytes:
        raise MapError(f"{where}: the map is truncated ({os.fstat(fd).st_size} of {header.file_bytes} bytes)")
    return header


def write_header(fd: int, header: MapHeader) -> None:
    """Write the header and make it durable."""
    os.pwrite(fd, header.pack(), 0)
    os.fsync(fd)


def create_bits(fd: int, header: MapHeader, *, trusted: bool) -> None:
    """Write all bits of a new map: clear where the file is *trusted* (it holds zeros), else set."""
    os.pwrite(fd, bytes([0 if trusted else 255]) * (header.file_bytes - BITS_OFFSET), BITS_OFFSET)


def read_bits(fd: int, header: MapHeader) -> list[bool]:
    """For each granule, whether its bit is set: the file is not to be trusted there."""
    data = os.pread(fd, header.file_bytes - BITS_OFFSET, BITS_OFFSET)
    return [bool(data[i // 8] >> i % 8 & 1) for i in range(header.granules)]
