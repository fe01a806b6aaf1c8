# SPDX-License-Identifier: BSD-3-Clause
"""The local file that takes what is written while a device's server is away; only this host has what lies in it.

A link beside the device's bitmap names it, so that the device is never served without what it holds.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from crc32c import crc32c

from tmemd.binding import _core
from tmemd.device import files
from tmemd.store.poolfile import PoolError

MAGIC: Final = b"TMEMOVER"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ16s")  # magic, version, 0, pages, uuid of the device's bitmap
_CRC: Final = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """Whose pages it holds."""

    pages: int  # of the device
    uuid: UUID  # of the device's bitmap

    def pack(self) -> bytes:
        """Its page."""
        body = _HEADER.pack(MAGIC, VERSION, 0, self.pages, self.uuid.bytes)
        return (body + _CRC.pack(crc32c(body))).ljust(_core.PAGE, b"\0")

    @classmethod
    def unpack(cls, data: bytes, where: Path) -> Header:
        """Raises PoolError, naming *where*, for anything but a whole one of this version."""
        body = data[: _HEADER.size]
        if len(data) < _HEADER.size + _CRC.size or not body.startswith(MAGIC):
            raise PoolError(f"{where}: not a tmem overflow file")
        _, version, _, pages, uid = _HEADER.unpack(body)
        if version != VERSION:
            raise PoolError(f"{where}: overflow format version {version}, this tmemd reads version {VERSION}")
        if _CRC.unpack_from(data, _HEADER.size)[0] != crc32c(body):
            raise PoolError(f"{where}: the overflow file's header is damaged (checksum mismatch)")
        return cls(pages, UUID(bytes=uid))


def open_overflow(path: Path, header: Header, bitmap: Path, undo: ExitStack) -> int:
    """Open and lock the file, made if it is not there, and leave the link beside *bitmap*; *undo* takes back both.

    Returns its descriptor. Raises PoolError.
    """
    with files.named_errors(path), ExitStack() as on_error:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW) if path.exists() else _create(path, header, undo)
        on_error.callback(os.close, fd)
        files.check_private(fd, path)
        files.lock(fd, path)
        _check(fd, path, header)
        _leave_link(path, bitmap, undo)
        on_error.pop_all()
    return fd


def _check(fd: int, path: Path, header: Header) -> None:
    found = Header.unpack(os.pread(fd, _core.PAGE, 0), path)
    if found != header:
        raise PoolError(f"{path}: the overflow file of another device")
    if files.length(fd) != _core.Overflow.file_bytes(found.pages):
        raise PoolError(f"{path}: the overflow file is truncated")


def _create(path: Path, header: Header, undo: ExitStack) -> int:
    """It has its name only when it is whole."""
    new = Path(f"{path}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with ExitStack() as on_error:
        on_error.callback(os.close, fd)
        on_error.callback(new.unlink, missing_ok=True)
        length = _core.Overflow.file_bytes(header.pages)
        os.ftruncate(fd, length)
        os.posix_fallocate(fd, 0, length - header.pages * _core.PAGE)  # a bit that cannot be set would be SIGBUS
        os.pwrite(fd, header.pack(), 0)
        os.fsync(fd)
        new.rename(path)
        undo.callback(path.unlink)
        files.sync_directory(path.parent)
        on_error.pop_all()
    return fd


def _link_beside(bitmap: Path) -> Path:
    return Path(f"{bitmap}.overflow")


def _leave_link(path: Path, bitmap: Path, undo: ExitStack) -> None:
    link = _link_beside(bitmap)
    if link.is_symlink() and link.readlink() == path:
        return
    link.symlink_to(path)
    undo.callback(link.unlink)
    files.sync_directory(link.parent)


def check_left(bitmap: Path, path: Path | None) -> None:
    """Forget the overflow file that the device had before, if that is not *path* and is empty. Raises PoolError."""
    link = _link_beside(bitmap)
    if not link.is_symlink():
        return
    if not (before := link.readlink()).exists():
        raise PoolError(
            f"{before}: pages may be in this overflow file, which is gone: restore it; if it was empty, remove {link}"
        )
    if before == path:
        return
    if count := _count(before):
        raise PoolError(f"{before}: {count} pages are in this overflow file: serve with overflow={before} until they"
                        " are written back ('tmemctl show' counts them)")  # fmt: skip
    link.unlink()
    files.sync_directory(link.parent)


def _count(path: Path) -> int:
    """How many pages lie in it. Raises PoolError."""
    with files.named_errors(path), path.open("rb") as file:
        header = Header.unpack(file.read(_core.PAGE), path)
        bits = file.read(_core.Overflow.file_bytes(header.pages) - (header.pages + 1) * _core.PAGE)
    return int.from_bytes(bits, "little").bit_count()
