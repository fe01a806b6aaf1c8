# SPDX-License-Identifier: BSD-3-Clause
"""The index of a pool file, read from outside: where each page of a device is.

Through pread and SEEK_DATA only, as everything outside the plugin: reading a hole of a tmpfs file through a mapping
would allocate it. A pool in use changes while it is read.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemd.store.poolfile import BLOCK_PAGES, PAGE, STATES_OFFSET, Identity, PoolError

BLOCK_BYTES: Final = BLOCK_PAGES * PAGE  # of the device
SPAN: Final = 256 * 1024  # bytes of memory whose records are of one size class
_READ: Final = 64 * PAGE  # bytes of index read at a time
_MAX_PAGES: Final = 1 << 32
_MAX_DATA: Final = 1 << 40
_RUN: Final = re.compile(rb"(.)\1*", re.DOTALL)


class Kind(enum.IntEnum):
    """Where a page is, by its index word."""

    NOWHERE = 0
    TMEM = 1
    FILE = 2
    ZERO = 3
    LOST = 4
    TORN = 5


class State(enum.IntEnum):
    """What the pages of a block are while its page of the index is not in use."""

    INDEX = 0
    FILE = 1
    LOST = 2
    ZERO = 3


# A word or state that is none is unreadable, which is as good as lost; `tmemctl check` says more.
_KINDS: Final = tuple(Kind) + (Kind.LOST,) * (8 - len(Kind))
_KIND_OF_STATE: Final = (Kind.NOWHERE, Kind.FILE, Kind.LOST, Kind.ZERO) + (Kind.LOST,) * (256 - len(State))
_TO_KIND: Final = bytes(_KINDS[byte & 7] for byte in range(256))


@dataclass(frozen=True)
class Run:
    """Neighbouring pages that are all in the same place."""

    start: int
    count: int
    kind: Kind


def is_read_by_blkid(page: int, pages: int) -> bool:
    """Whether *page*, of so many, is one that `blkid` reads: it is written through, so that it is in the file."""
    return page <= 128 or pages - page <= 128 or page in (256, 512, 1024) or pages - page == 386


def block_count(size: int) -> int:
    """Blocks of a device of *size* bytes; the last may be partly beyond its end."""
    return -(-size // BLOCK_BYTES)


def check_layout(identity: Identity, where: str | Path) -> None:
    """Raise PoolError unless the parts of the pool lie one behind the other, aligned, and within bounds."""
    blocks = block_count(identity.size)
    possible = (
        0 < identity.pages <= _MAX_PAGES
        and identity.index_offset % PAGE == 0
        and identity.data_offset % SPAN == 0
        and 0 < identity.data_bytes <= _MAX_DATA
        and identity.index_offset >= STATES_OFFSET + blocks
        and identity.index_offset + blocks * PAGE <= identity.data_offset < 1 << 62
    )
    if not possible:
        raise PoolError(f"{where}: the parts of the pool cannot lie where its identity page says")


def read_exactly(fd: int, count: int, offset: int) -> bytes:
    """*count* bytes; what lies beyond the end of the file reads as zeros."""
    parts = []
    while count and (part := os.pread(fd, count, offset)):
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts) + bytes(count)


def allocated(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges [from, to) of [start, end) that hold data; what is in none of them is zeros."""
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
            if data >= end:
                return
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError:  # ENXIO: no data beyond here, perhaps because the file was cut meanwhile
            return
        yield data, hole
        start = hole


def read_states(fd: int, identity: Identity) -> bytes:
    """One State for each block."""
    return read_exactly(fd, block_count(identity.size), STATES_OFFSET)


def index_chunks(fd: int, identity: Identity) -> Iterator[tuple[int, bytes]]:
    """The pages of the index that are not holes, some at a time: the number of the first block, and their bytes."""
    start, end = identity.index_offset, identity.index_offset + block_count(identity.size) * PAGE
    for begin, stop in allocated(fd, start, end):
        for offset in range(begin, stop, _READ):
            yield (offset - start) // PAGE, read_exactly(fd, min(_READ, stop - offset), offset)


def runs(fd: int, identity: Identity) -> Iterator[Run]:
    """Where all pages of the device are, in order. The layout was checked."""
    start, count, kind = 0, 0, Kind.NOWHERE
    for length, byte in _pieces(fd, identity):
        if byte == kind:
            count += length
            continue
        if count:
            yield Run(start, count, kind)
        start, count, kind = start + count, length, _KINDS[byte]
    if count:
        yield Run(start, min(count, identity.pages - start), kind)


def _pieces(fd: int, identity: Identity) -> Iterator[tuple[int, int]]:
    """Pairs of a number of pages and their kind, neighbours perhaps of the same."""
    states = read_states(fd, identity)
    done = 0
    for block, chunk in index_chunks(fd, identity):
        yield from _state_pieces(states, done, block)
        done = block + len(chunk) // PAGE
        yield from _chunk_pieces(states, block, chunk)
    yield from _state_pieces(states, done, len(states))


def _state_pieces(states: bytes, block: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _RUN.finditer(states, block, end):
        kind = _KIND_OF_STATE[match[1][0]]
        pages = (match.end() - match.start()) * BLOCK_PAGES
        yield pages, kind


def _chunk_pieces(states: bytes, block: int, chunk: bytes) -> Iterator[tuple[int, int]]:
    # The kind is in the lowest bits of each little-endian word.
    kinds = chunk[::8].translate(_TO_KIND)
    here = states[block : block + len(chunk) // PAGE]
    if not any(here):
        yield from _byte_pieces(kinds)
        return
    for i, state in enumerate(here):
        if state == State.INDEX:
            yield from _byte_pieces(kinds[i * BLOCK_PAGES : (i + 1) * BLOCK_PAGES])
        else:
            yield from _state_pieces(states, block + i, block + i + 1)


def _byte_pieces(kinds: bytes) -> Iterator[tuple[int, int]]:
    for match in _RUN.finditer(kinds):
        yield match.end() - match.start(), match[1][0]
