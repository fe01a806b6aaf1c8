# SPDX-License-Identifier: BSD-3-Clause
"""The write-intent bitmap's header: which device a backing file holds, and which pool was last in use with it.

The bits behind it, one for each region, are the page path's (tmemd/core); docs/pool-format.md has the layout.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from crc32c import crc32c

from tmemd.store.poolfile import PoolError

MAGIC: Final = b"TMEMMAP1"
VERSION: Final = 1
BITS_OFFSET: Final = 4096
REGION: Final = 32 << 20  # bytes of the device that share a bit
_HEADER: Final = struct.Struct("<8sIIQQ16s16sQ")
_CRC: Final = struct.Struct("<I")


@dataclass(frozen=True)
class BitmapHeader:
    """The header of a bitmap: sizes in bytes, and the epoch and boot of the pool that was last in use with it."""

    size: int  # of the device
    region: int
    uuid: UUID
    boot_id: UUID
    epoch: int
    restoring: bool = False  # a restore was begun, and has not ended: the file is no device
    unused: bool = False  # nobody has served it yet: all of it is zeros, whatever the bits say

    @property
    def regions(self) -> int:
        """Regions of the device: bits of the bitmap."""
        return -(-self.size // self.region)

    @property
    def file_bytes(self) -> int:
        """The length of the whole file."""
        return BITS_OFFSET + -(-self.regions // 8)

    def pack(self) -> bytes:
        """The header, 4096 bytes, checksum included."""
        flags = self.restoring | self.unused << 1
        body = _HEADER.pack(
            MAGIC, VERSION, flags, self.size, self.region, self.uuid.bytes, self.boot_id.bytes, self.epoch
        )
        return (body + _CRC.pack(crc32c(body))).ljust(BITS_OFFSET, b"\0")

    @classmethod
    def unpack(cls, data: bytes, where: Path | str) -> BitmapHeader:
        """Read a header; raises PoolError, naming *where*, for anything but a whole one of this version."""
        if len(data) < _HEADER.size + _CRC.size or data[:8] != MAGIC:
            raise PoolError(f"{where}: not a tmem write-intent bitmap")
        body = data[: _HEADER.size]
        _, version, flags, size, region, uid, boot, epoch = _HEADER.unpack(body)
        if version != VERSION:
            raise PoolError(f"{where}: bitmap format version {version}, this tmemd reads version {VERSION}")
        if _CRC.unpack_from(data, _HEADER.size)[0] != crc32c(body):
            raise PoolError(f"{where}: the bitmap's header is damaged (checksum mismatch)")
        if not size or not region or region % BITS_OFFSET:
            raise PoolError(f"{where}: the bitmap's header contradicts itself")
        return cls(size, region, UUID(bytes=uid), UUID(bytes=boot), epoch, bool(flags & 1), bool(flags & 2))


def read_header(fd: int, where: Path | str) -> BitmapHeader:
    """The header of the bitmap behind *fd*, whose length is checked too. Raises PoolError."""
    header = BitmapHeader.unpack(os.pread(fd, BITS_OFFSET, 0), where)
    if os.fstat(fd).st_size < header.file_bytes:
        raise PoolError(f"{where}: the bitmap is truncated ({os.fstat(fd).st_size} of {header.file_bytes} bytes)")
    return header


def write_header(fd: int, header: BitmapHeader) -> None:
    """Write the header and make it durable."""
    os.pwrite(fd, header.pack(), 0)
    os.fsync(fd)


def create_bits(fd: int, header: BitmapHeader, *, trusted: bool) -> None:
    """Write all bits of a new bitmap: clear where the file is *trusted* (it holds zeros), else set."""
    os.pwrite(fd, bytes([0 if trusted else 255]) * (header.file_bytes - BITS_OFFSET), BITS_OFFSET)


def read_bits(fd: int, header: BitmapHeader) -> list[bool]:
    """For each region, whether its bit is set: the file is not to be trusted there."""
    data = os.pread(fd, header.file_bytes - BITS_OFFSET, BITS_OFFSET)
    return [bool(data[i // 8] >> i % 8 & 1) for i in range(header.regions)]
