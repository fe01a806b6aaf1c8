# SPDX-License-Identifier: BSD-3-Clause
"""A reader of pool files written from docs/pool-format.md alone: what is where, independent of the code under test."""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tmemd.store import poolfile

BLOCK = 512
GENERATIONS = 16
RECORD_HEADER = 12


class Kind(enum.IntEnum):
    """What an index word says of its page."""

    NOWHERE = 0
    TMEM = 1
    FILE = 2
    ZERO = 3
    LOST = 4
    TORN = 5


_KINDS = tuple(Kind)


@dataclass(frozen=True)
class Word:
    """One index word."""

    value: int

    @property
    def kind(self) -> Kind:
        """Where the page is."""
        return _KINDS[self.value & 7]

    @property
    def generation(self) -> int:
        """In which it was last used; 0: long ago."""
        return self.value >> 8 & 15

    def age(self, now: int) -> int:
        """How many generations before generation *now* it was last used; 15: longer ago."""
        return (now - self.generation) % (GENERATIONS - 1) if self.generation else GENERATIONS - 1

    @property
    def length(self) -> int:
        """Bytes of payload of a page in tmem."""
        return self.value >> 12 & 0x1FFF

    @property
    def location(self) -> int:
        """Offset of its record from `data_offset`."""
        return self.value >> 28 << 4

    @property
    def slot(self) -> int:
        """Bytes of the slot its record lies in."""
        return max(32, -(-(RECORD_HEADER + self.length) // 16) * 16)


_BY_STATE = (None, Kind.FILE, Kind.LOST, Kind.ZERO)


def _values(pool: Path) -> list[int]:
    with open(pool, "rb") as file:
        identity = poolfile.read_identity(file.fileno(), pool)
        assert identity is not None
        raw = os.pread(file.fileno(), identity.pages * 8, identity.index_offset)
        states = os.pread(file.fileno(), -(-identity.pages // BLOCK), poolfile.STATES_OFFSET)
    values = list(struct.unpack(f"<{identity.pages}Q", raw))
    for block, state in enumerate(states):
        if (kind := _BY_STATE[state]) is not None:
            pages = range(block * BLOCK, min((block + 1) * BLOCK, identity.pages))
            for page in pages:
                values[page] = Kind.FILE if page == 0 and kind is Kind.LOST else kind
    return values


def words(pool: Path) -> list[Word]:
    """Every page's word; block states other than 0 are spelled out."""
    return [Word(value) for value in _values(pool)]


def kinds(pool: Path) -> list[Kind]:
    """Where each page is."""
    return [word.kind for word in words(pool)]


def record_offset(pool: Path, page: int) -> int:
    """Where in the pool file the record of a page in tmem begins."""
    with open(pool, "rb") as file:
        identity = poolfile.read_identity(file.fileno(), pool)
    assert identity is not None
    word = Word(_values(pool)[page])
    assert word.kind is Kind.TMEM
    return identity.data_offset + word.location
