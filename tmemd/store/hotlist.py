# SPDX-License-Identifier: BSD-3-Clause
"""The list of a device's hottest pages: numbers alone, by which another host, or this one after a reboot, reads ahead.

JSON, so that it can be looked at. What it says is a hint: pages are fetched from the file as the device finds them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import msgspec

from tmemd.store.poolfile import BLOCK_PAGES, GENERATIONS, NAME_PATTERN, Identity, PoolError, Snapshot
from tmemd.store.poolindex import Kind, block_count, index_chunks
from tmemd.store.savefile import MAX_SIZE

_MAX_BYTES: Final = 256 << 20
_NONE: Final = 255  # for an age: the page is not in tmem
_RUN: Final = re.compile(rb"(.)\1*", re.DOTALL)

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class HotList(msgspec.Struct, frozen=True, kw_only=True):
    """Which pages of which device. What it does not know a reader ignores."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]  # of the device, in bytes
    uuid: UUID | None  # of the device; None: a cache device, which has none that other hosts know
    ranges: list[tuple[Number, Number]]  # the first page and how many, the hottest range first

    @property
    def pages(self) -> int:
        """How many are on it."""
        return sum(count for _, count in self.ranges)

    def check(self, identity: Identity, where: str | Path) -> None:
        """Raise PoolError where it is not of the device that has this pool."""
        if (self.size, self.uuid) != (identity.size, _uuid_of(identity)):
            raise PoolError(f"{where}: the list of another device ({self.name!r}), or of what it was before")
        if any(first + count > identity.pages for first, count in self.ranges):
            raise PoolError(f"{where} is damaged: it names pages that the device has not")


def _uuid_of(identity: Identity) -> UUID | None:
    return None if identity.is_ephemeral else identity.uuid


def of_pool(fd: int, path: Path, identity: Identity) -> HotList:
    """The pages that a pool has in tmem, those that were used last first. Its layout was checked."""
    ages = _ages(fd, identity, Snapshot().take(fd, path).ages().generation)
    runs = [(match[1][0], match.start(), match.end()) for match in _RUN.finditer(ages) if match[1][0] != _NONE]
    ranges = [(start, end - start) for _, start, end in sorted(runs)]
    return HotList(name=identity.name, size=identity.size, uuid=_uuid_of(identity), ranges=ranges)


def _ages(fd: int, identity: Identity, now: int) -> bytearray:
    """Of each page how many generations ago it was used, if it is in tmem."""
    age_of = [(now - then) % (GENERATIONS - 1) if then else GENERATIONS - 1 for then in range(GENERATIONS)]
    ages = bytearray([_NONE]) * (block_count(identity.size) * BLOCK_PAGES)
    for block, chunk in index_chunks(fd, identity):
        words = zip(chunk[::8], chunk[1::8], strict=True)  # kind, and generation
        found = bytes(age_of[then & 15] if kind & 7 == Kind.TMEM else _NONE for kind, then in words)
        ages[block * BLOCK_PAGES : block * BLOCK_PAGES + len(found)] = found
    return ages


def _open_at_once(path: str, flags: int) -> int:
    """A pipe, which is no list, would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def read(path: Path) -> HotList:
    """The list in a file. Raises PoolError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            data = file.read(_MAX_BYTES + 1) or b""
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise PoolError(f"{path} is no list of tmemctl: it cannot be that long")
    try:
        return msgspec.json.decode(data, type=HotList)
    except msgspec.MsgspecError as error:
        raise PoolError(f"{path} is damaged, or no list of tmemctl: {error}") from None
