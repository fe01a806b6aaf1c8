# SPDX-License-Identifier: BSD-3-Clause
"""The pool file as other processes see it: identity, counters, control words.

A pool file has one page each for its identity (written once, by the process that creates the pool), its counters
(written by the plugin that serves the device) and its control words (written by who controls the pool's directory:
tmemd, or tmemctl where no tmemd runs). docs/pool-format.md has the whole layout. Everything here goes through pread and
pwrite: a process that does not serve the device never maps the file, for a truncated mapping is SIGBUS.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypeAlias
from uuid import UUID

import msgspec
from crc32c import crc32c

from tmemd.system import locks

PAGE: Final = 4096
MAGIC: Final = b"TMEMPOOL"
VERSION: Final = 2
COUNTERS_OFFSET: Final = PAGE
CONTROL_OFFSET: Final = 2 * PAGE
CONTROL_BYTES: Final = 256  # for control words; requests follow
STATISTICS_OFFSET: Final = 3 * PAGE
STATES_OFFSET: Final = 4 * PAGE
BLOCK_PAGES: Final = 512  # pages of the device whose index words share a page of the index
PATH_BYTES: Final = 1024
SUFFIX: Final = ".pool"
# A name becomes a file name, so its first character can be neither '.' nor '-', and '/' is nowhere.
NAME_PATTERN: Final = r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z"
NAME_RULE: Final = "a name is 1 to 63 letters, digits, '_', '.' and '-', the first a letter or digit"

NO_TARGET: Final = 1 << 62  # written as a target: the device's limit alone holds, whatever it becomes
_IDENTITY: Final = struct.Struct(f"<8sIIQQQQQQ16s16sQ64s{PATH_BYTES}s{PATH_BYTES}s")
_CRC: Final = struct.Struct("<I")
_WORD: Final = struct.Struct("<Q")
_CHECKED: Final = struct.Struct("<QQ")
_ALL_ONES: Final = (1 << 64) - 1
# It lies beyond any pool file's end, so that no lock ever meets data.
_OWNER_LOCK: Final = 1 << 62


# Whether a pool holds what may be nowhere else, or copies that may go at any moment.
PoolKind: TypeAlias = Literal["persistent", "ephemeral"]


class PoolError(Exception):
    """A pool, its backing file or its bitmap cannot be used; the message says which one, why, and what to do."""


class AwayError(PoolError):
    """The NBD server that has a device's file cannot be reached, or not used: it may be back in a moment."""


# How work that needs the file fails where only that is wrong.
AWAY: Final = {
    errno.ETIMEDOUT: "the server that has its file did not answer in time",
    errno.EAGAIN: "the server that has its file went away and came back each time, and may have forgotten pages",
}


def is_name(name: str) -> bool:
    """Whether a pool can have that name."""
    return re.match(NAME_PATTERN, name) is not None


def check_name(name: str) -> str:
    """The name itself, if it is one. Raises PoolError."""
    if not is_name(name):
        raise PoolError(f"{name!r} is no pool name: {NAME_RULE}")
    return name


@dataclass(frozen=True)
class Identity:
    """The identity page: what device a pool belongs to, and where its parts lie. All offsets and sizes in bytes."""

    name: str
    size: int
    index_offset: int
    data_offset: int
    data_bytes: int
    uuid: UUID
    boot_id: UUID
    epoch: int  # how often a pool was made for this device
    has_file: bool
    backing: str = ""  # paths of the backing file or source, and of the bitmap, when it was last opened; '' for none
    bitmap: str = ""
    is_ephemeral: bool = False  # the file is a source, and pages are copies of what it holds
    is_durable: bool = False  # a persistent pool's file has each write before it is acknowledged
    is_handed_over: bool = False  # it is durable until it is handed back
    is_restoring: bool = False  # a restore was begun, and has not ended: what is there is nobody's

    @property
    def kind(self) -> PoolKind:
        """Of the pool."""
        return "ephemeral" if self.is_ephemeral else "persistent"

    @cached_property
    def pages(self) -> int:
        """Pages of the device; the last one may be partly beyond its end."""
        return -(-self.size // PAGE)

    @property
    def file_bytes(self) -> int:
        """The length a whole pool file has."""
        return self.data_offset + self.data_bytes

    def pack(self) -> bytes:
        """The identity page, 4096 bytes, checksum included."""
        flags = self.has_file | self.is_ephemeral << 1 | self.is_durable << 2 | self.is_restoring << 3
        flags |= self.is_handed_over << 4
        body = _IDENTITY.pack(
            MAGIC, VERSION, flags, self.size, self.pages, STATES_OFFSET,
            self.index_offset, self.data_offset, self.data_bytes, self.uuid.bytes, self.boot_id.bytes, self.epoch,
            self.name.encode(), self.backing.encode(), self.bitmap.encode(),
        )  # fmt: skip
        return (body + _CRC.pack(crc32c(body))).ljust(PAGE, b"\0")

    @classmethod
    def unpack(cls, page: bytes, where: str) -> Identity | None:
        """Read an identity page; None when it was never written. Raises PoolError, naming *where*, when it is wrong."""
        if not page.strip(b"\0"):
            return None
        if page[:8] != MAGIC:
            raise PoolError(f"{where}: not a tmem pool")
        if len(page) < PAGE:
            raise PoolError(f"{where}: the pool file is truncated: it ends inside its identity page")
        body = page[: _IDENTITY.size]
        _, version, flags, size, pages, states, index, data, data_bytes, uid, boot, epoch, *texts = _IDENTITY.unpack(
            body
        )
        if version != VERSION:
            raise PoolError(f"{where}: pool format version {version}, this tmemd reads version {VERSION}")
        if _CRC.unpack_from(page, _IDENTITY.size)[0] != crc32c(body):
            raise PoolError(f"{where}: the pool's identity page is damaged (checksum mismatch)")
        name, backing, bitmap = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        identity = cls(
            name, size, index, data, data_bytes, UUID(bytes=uid),
            UUID(bytes=boot), epoch, bool(flags & 1), backing, bitmap, bool(flags & 2), bool(flags & 4),
            bool(flags & 16), bool(flags & 8),
        )  # fmt: skip
        if identity.pages != pages or states != STATES_OFFSET or not states < index < data:
            raise PoolError(f"{where}: the pool's identity page contradicts itself")
        return identity


class Counters(msgspec.Struct, frozen=True, gc=False):
    """The counters page, in its order on disk. Sizes in bytes; pages and requests are counts; all only for reading."""

    used_bytes: int  # all the RAM the pool takes, index included
    limit_bytes: int  # the device's own upper bound, from its configuration
    minimum_bytes: int  # the smallest target the device works with
    pages_in_tmem: int
    pages_in_file: int
    pages_lost: int
    payload_bytes: int  # compressed bytes of the pages in tmem
    index_bytes: int
    puts: int  # pages offered to tmem, refused ones included
    puts_refused: int
    puts_zero: int
    puts_same: int
    puts_raw: int
    gets: int  # pages read from tmem
    file_reads: int  # pages read from the backing file, or the source
    invalidates: int  # stored pages dropped by overwrite, trim or zero
    spills: int  # pages written to the file because their put was refused
    demotions: int  # pages moved from tmem to the file; of an ephemeral pool: that just left
    moves: int  # records moved by compaction
    bad_checksums: int
    io_errors: int
    reads: int  # requests
    writes: int
    trims: int
    flushes: int
    regions_set: int = msgspec.field(name="granules_set")  # in which the file is not to be trusted
    pid: int  # of the process that serves the device
    demotion_writes: int = 0  # pages that demotion wrote to the file; one that was there already is not written
    promotions: int = 0  # pages put again when they were read from the file
    sync_failed: int = 0  # not 0: a sync of the file failed, and what was written there before may be lost
    fenced_at: int = 0  # nanoseconds since boot: from then on it is not served unless its lease is renewed; 0: no lease
    prefetching: int = 0  # not 0: pages are fetched ahead of reads now
    prefetches: int = 0  # pages fetched ahead
    prefetch_hits: int = 0  # of these, pages that were read from tmem then
    prefetch_wastes: int = 0  # of these, pages that left tmem, or changed, before anybody read them

    @property
    def lease_seconds(self) -> float | None:
        """How long it may still be served unless its lease is renewed; 0: no more. None: it has no lease."""
        left = self.fenced_at - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return max(left, 0) / 1e9 if self.fenced_at else None

    @property
    def is_fenced(self) -> bool:
        """Whether its lease is over, so that every request fails."""
        return self.lease_seconds == 0

    @property
    def compression(self) -> float | None:
        """Bytes of the pages in tmem for each byte that they take compressed; None: there are none."""
        return self.pages_in_tmem * PAGE / self.payload_bytes if self.pages_in_tmem and self.payload_bytes else None


_COUNTERS: Final = struct.Struct(f"<{len(Counters.__struct_fields__)}Q")
_SYNC_FAILED_OFFSET: Final = COUNTERS_OFFSET + Counters.__struct_fields__.index("sync_failed") * _WORD.size

GENERATIONS: Final = 16
GENERATION_SECONDS: Final = 5.0  # fifteen of them tell pages apart for the last minute or so
LATENCIES: Final = 47
_HISTOGRAM_WORDS: Final = 1 + LATENCIES

# Upper bounds of the histograms' buckets in nanoseconds, two in each octave; the last bucket has none.
LATENCY_BOUNDS_NS: Final = tuple((256, 384)[i % 2] << (i // 2) for i in range(LATENCIES - 1))


class Histogram(msgspec.Struct, frozen=True):
    """Latencies of one kind of page operation since the pool was made."""

    sum_ns: int
    counts: tuple[int, ...]  # of LATENCIES buckets, each up to its own bound; not cumulative

    @property
    def count(self) -> int:
        """How many operations it saw."""
        return sum(self.counts)


class Latencies(msgspec.Struct, frozen=True):
    """How long the page operations of a pool took."""

    put: Histogram  # stored ones
    get: Histogram
    spill: Histogram  # a run of pages written to the file
    file_read: Histogram  # a run of pages read from the file


class Ages(msgspec.Struct, frozen=True, gc=False):
    """Heat: GENERATIONS entries each, by how many generations ago a page was last put or read; the last: or longer."""

    gets: tuple[int, ...]  # pages read from tmem, by their age before
    file_reads: tuple[int, ...]
    freed: tuple[int, ...]  # pages, in tmem or in the file, that were overwritten or trimmed
    stored_bytes: tuple[int, ...]  # as last published: slots of the pages in tmem
    raw_bytes: tuple[int, ...]  # of these, slots of incompressible pages
    in_file_pages: tuple[int, ...] = msgspec.field(name="filed_pages")
    published: int = msgspec.field(name="surveys")  # how often the last three were
    generation: int = 0  # that is current: from 1 to GENERATIONS - 1, in turn


class Doors(msgspec.Struct, frozen=True):
    """Who came in through which door, and what the virtio door did."""

    nbd: int  # connections now
    vhost: int
    requests: int  # by virtio, as all that follows
    failures: int  # of requests, whoever's fault
    kicks: int  # from the guest
    interrupts: int  # to the guest
    polls: int  # watched a queue before sleeping
    polls_won: int  # and something came
    request: Histogram  # of one in sixteen: from its being found in the queue until it is answered


class RemoteState(msgspec.Struct, frozen=True):
    """How the NBD server is that has a device's file, as published twice a second by who serves it."""

    published: int  # 0: there is none, or nobody has served the device yet
    connections: int  # now; 0: it is away
    connects: int  # since the process began that serves the device, as all that follows
    losses: int  # of connections
    time_outs: int  # requests that had no answer in time
    repeats: int  # requests sent again after a loss
    away_ms: int
    overflow: int  # pages in the local file that takes what is written meanwhile
    trims: int  # pages that were trimmed, of which it was told
    export_bytes: int  # of what the server exports, and what it can: whoever serves the device next may go by that
    abilities: int

    @property
    def is_away(self) -> bool:
        """Whether what needs it has to wait."""
        return self.published > 0 and self.connections == 0


class Control(msgspec.Struct, frozen=True, gc=False):
    """What the control page says; None: nobody said it."""

    target: int | None  # bytes; None: the device's limit holds
    frozen: bool  # whether the pool refuses puts
    demotion_writes: int | None  # pages that demotion may have written since the pool was made; None: no bound
    compression: bool

    @classmethod
    def unpack(cls, data: bytes | bytearray, offset: int = 0) -> Control:
        """From the control page's words."""
        # Written out: the governor does it for every pool at each tick, and a loop takes three times as long (0.67 us).
        target, no_target, frozen, no_frozen, writes, no_writes, packed, no_packed = _CONTROL.unpack_from(data, offset)
        return cls(
            target if target ^ no_target == _ALL_ONES else None,
            frozen ^ no_frozen == _ALL_ONES and frozen != 0,
            writes if writes ^ no_writes == _ALL_ONES else None,
            packed ^ no_packed != _ALL_ONES or packed != 0,
        )


_LATENCY_WORDS: Final = struct.Struct(f"<{4 * _HISTOGRAM_WORDS}Q")
_AGE_WORDS: Final = struct.Struct(f"<{6 * GENERATIONS + 2}Q")
_FILE_READ_NS: Final = STATISTICS_OFFSET + 3 * _HISTOGRAM_WORDS * _WORD.size
_AGES_OFFSET: Final = STATISTICS_OFFSET + _LATENCY_WORDS.size
_PUBLISHED: Final = _AGES_OFFSET + 6 * GENERATIONS * _WORD.size
_DOORS: Final = struct.Struct(f"<{len(Doors.__struct_fields__) - 1 + _HISTOGRAM_WORDS}Q")
_DOORS_OFFSET: Final = _AGES_OFFSET + _AGE_WORDS.size
_CONNECTIONS: Final = struct.Struct("<2Q")  # the first of the doors' words
_REMOTE: Final = struct.Struct(f"<{len(RemoteState.__struct_fields__)}Q")
_REMOTE_OFFSET: Final = _DOORS_OFFSET + _DOORS.size
_SNAPSHOT_BYTES: Final = _REMOTE_OFFSET + _REMOTE.size - COUNTERS_OFFSET

# Each value of the control page stands with its complement, so that a torn write is seen and ignored.
_CONTROL: Final = struct.Struct("<8Q")
_TARGET, _FROZEN, _DEMOTION_WRITES, _COMPRESSION = range(CONTROL_OFFSET, CONTROL_OFFSET + _CONTROL.size, _CHECKED.size)


def lock(fd: int) -> bool:
    """Take the owner lock, to serve the pool, without waiting; False when another process holds it.

    It goes when the last descriptor of this open is closed.
    """
    return locks.try_lock(fd, _OWNER_LOCK, 1)


def is_locked(fd: int) -> bool:
    """Whether somebody else serves the pool."""
    return locks.is_locked(fd, _OWNER_LOCK, 1)


def read_identity(fd: int, where: str | Path) -> Identity | None:
    """The identity of the pool behind *fd*, or None when nothing was created there yet. Raises PoolError."""
    return Identity.unpack(os.pread(fd, PAGE, 0), str(where))


class Snapshot:
    """Counters, control words and statistics of a pool, in one read; each is only unpacked when it is asked for."""

    def __init__(self) -> None:
        self._data = bytearray(_SNAPSHOT_BYTES)

    def take(self, fd: int, where: str | Path) -> Snapshot:
        """Read those of the pool behind *fd*; returns itself. Raises PoolError."""
        if os.preadv(fd, (self._data,), COUNTERS_OFFSET) < _SNAPSHOT_BYTES:
            raise PoolError(f"{where}: the pool file is truncated ({os.fstat(fd).st_size} bytes)")
        return self

    def part(self, offset: int, size: int) -> bytearray:
        """So many bytes of the file."""
        return self._data[offset - COUNTERS_OFFSET :][:size]

    def activity(self) -> bytearray:
        """The counters and control pages: the same again where nothing has happened."""
        return self.part(COUNTERS_OFFSET, STATISTICS_OFFSET - COUNTERS_OFFSET)

    def counters(self) -> Counters:
        """The counters; each is consistent by itself, not with the others."""
        return Counters(*_COUNTERS.unpack_from(self._data))

    def control(self) -> Control:
        """What holds for the pool until it is written again."""
        return Control.unpack(self._data, CONTROL_OFFSET - COUNTERS_OFFSET)

    def latencies(self) -> Latencies:
        """The latency histograms."""
        words = _LATENCY_WORDS.unpack_from(self._data, STATISTICS_OFFSET - COUNTERS_OFFSET)
        rows = [words[i : i + _HISTOGRAM_WORDS] for i in range(0, len(words), _HISTOGRAM_WORDS)]
        return Latencies(*(Histogram(row[0], row[1:]) for row in rows))

    def file_read_ns(self) -> int:
        """Nanoseconds that reading pages from the file, or the source, has taken."""
        nanoseconds: int = _WORD.unpack_from(self._data, _FILE_READ_NS - COUNTERS_OFFSET)[0]
        return nanoseconds

    def ages(self, known: Ages | None = None) -> Ages:
        """What is known by age; *known* itself where nothing was published since."""
        if known and _WORD.unpack_from(self._data, _PUBLISHED - COUNTERS_OFFSET)[0] == known.published:
            return known
        words = _AGE_WORDS.unpack_from(self._data, _AGES_OFFSET - COUNTERS_OFFSET)
        gets, reads, freed, stored, raw, in_file = [
            words[i : i + GENERATIONS] for i in range(0, 6 * GENERATIONS, GENERATIONS)
        ]
        return Ages(gets, reads, freed, stored, raw, in_file, *words[6 * GENERATIONS :])

    def connections(self) -> tuple[int, int]:
        """Of clients: by NBD, by virtio."""
        nbd, vhost = _CONNECTIONS.unpack_from(self._data, _DOORS_OFFSET - COUNTERS_OFFSET)
        return nbd, vhost

    def doors(self) -> Doors:
        """Its clients, and what the virtio door did."""
        nbd, vhost, requests, failures, kicks, interrupts, polls, won, ns, *counts = _DOORS.unpack_from(
            self._data, _DOORS_OFFSET - COUNTERS_OFFSET
        )
        return Doors(nbd, vhost, requests, failures, kicks, interrupts, polls, won, Histogram(ns, tuple(counts)))

    def remote(self) -> RemoteState:
        """How the server is that has its file."""
        return RemoteState(*_REMOTE.unpack_from(self._data, _REMOTE_OFFSET - COUNTERS_OFFSET))


def read_counters(fd: int, where: str | Path) -> Counters:
    """The counters of a snapshot taken now. Raises PoolError."""
    return Snapshot().take(fd, where).counters()


def has_failed_sync(fd: int) -> bool:
    """Whether a sync of the file failed, by the counters page, also while the pool is unfinished."""
    return any(os.pread(fd, _WORD.size, _SYNC_FAILED_OFFSET))


def new_counters(*, limit: int, least: int, sync_failed: bool) -> Counters:
    """Of a pool that nobody has opened yet. Sizes in bytes."""
    none = Counters(*[0] * len(Counters.__struct_fields__))
    return msgspec.structs.replace(none, limit_bytes=limit, minimum_bytes=least, sync_failed=int(sync_failed))


def unmake(fd: int, counters: Counters) -> None:
    """Leave nothing of the pool but these counters, old or new at each moment."""
    os.pwrite(fd, bytes(PAGE), 0)
    os.pwrite(fd, _pack(counters).ljust(CONTROL_OFFSET - COUNTERS_OFFSET, b"\0"), COUNTERS_OFFSET)
    os.ftruncate(fd, CONTROL_OFFSET)


def read_control(fd: int) -> Control:
    """What the control page says, also while the pool is unfinished."""
    return Control.unpack(os.pread(fd, _CONTROL.size, CONTROL_OFFSET).ljust(_CONTROL.size, b"\0"))


def _write_checked(fd: int, offset: int, value: int) -> None:
    os.pwrite(fd, _CHECKED.pack(value, value ^ _ALL_ONES), offset)


def write_counters(fd: int, counters: Counters) -> None:
    """Say what is known of a pool that nobody serves. The caller holds the owner lock."""
    os.pwrite(fd, _pack(counters), COUNTERS_OFFSET)


def _pack(counters: Counters) -> bytes:
    return _COUNTERS.pack(*msgspec.structs.astuple(counters))


def write_target(fd: int, target: int) -> None:
    """Set the target, in bytes. The caller controls the directory."""
    _write_checked(fd, _TARGET, target)


def write_frozen(fd: int, frozen: bool) -> None:
    """Freeze or thaw the pool; it takes effect with the next put. The caller controls the directory."""
    _write_checked(fd, _FROZEN, int(frozen))


def write_demotion_writes(fd: int, pages: int | None) -> None:
    """Bound Counters.demotion_writes; None: no bound. The caller controls the directory."""
    if pages is None:
        os.pwrite(fd, bytes(_CHECKED.size), _DEMOTION_WRITES)
    else:
        _write_checked(fd, _DEMOTION_WRITES, pages)


def write_compression(fd: int, compression: bool) -> None:
    """Compress pages that are put from now on, or store them as they are. The caller controls the directory."""
    _write_checked(fd, _COMPRESSION, int(compression))


def freeable(identity: Identity, counters: Counters) -> int:
    """Bytes of RAM that demotion could give back: all memory for records.

    Header and index stay. A pool without a backing file has nowhere to demote to.
    """
    stays = identity.index_offset + counters.index_bytes
    return max(counters.used_bytes - stays, 0) if identity.has_file else 0
