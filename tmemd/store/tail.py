# SPDX-License-Identifier: BSD-3-Clause
"""The tail of a backing: who it belongs to, who may use it now, and the write-intent map, in its last blocks.

With it a block device or an export on another host is one thing, which can be picked up by any host. Blocks have 4096
bytes and a checksum each, but for the map, whose bits are right one by one, whether a write of them was torn or not.
docs/pool-format.md has the layout; tmemd.device.lease says what the claims, renewals and requests mean.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, Protocol, Self
from uuid import UUID

from crc32c import crc32c

from tmemd.store.bitmapfile import REGION
from tmemd.store.poolfile import PoolError

BLOCK: Final = 4096
MAGIC: Final = b"TMEMTAIL"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sII")  # magic, version, kind
_CRC: Final = struct.Struct("<I")

# Blocks from the tail's beginning. The map comes next, and the last block is the identity once more.
_IDENTITY, _CLAIMS, _RENEWALS, _REQUEST, _MAP = 0, 1, 3, 5, 6
_MAP_COVERS: Final = 8 * BLOCK * REGION  # bytes of device for which one block of the map has the bits


class Store(Protocol):
    """Where a device's pages are that are not in tmem: bytes of a file, a block device or an export.

    Every method raises OSError.
    """

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read(self, offset: int, length: int) -> bytes:
        """As they are now, for whoever writes them on another host as well: from no cache of this one."""

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        """*durable*: they are, when this returns."""

    def flush(self) -> None:
        """Make all that was written durable."""


class _Kind(IntEnum):
    IDENTITY = 1
    CLAIM = 2
    RENEWAL = 3
    REQUEST = 4


class State(IntEnum):
    """What whoever claimed the device says of it."""

    HELD = 1
    RELEASED = 2  # he serves it no more, and everything that he acknowledged is in the backing or lost


@dataclass(frozen=True)
class Identity:
    """Which device a backing is: sizes in bytes."""

    size: int  # of the device
    length: int  # of the backing, tail included
    region: int  # that shares a bit of the map
    uuid: UUID
    name: str
    is_whole: bool = True  # False: somebody was killed while he made it, and nobody has used it yet
    restoring: bool = False  # somebody began to restore the device, and has not ended
    unused: bool = False  # nobody has served it yet: all of it is zeros, whatever the map says

    _STRUCT = struct.Struct("<QQQII16s64s")

    @property
    def map_bytes(self) -> int:
        """Bytes of the map that have bits."""
        return -(-self.regions // 8)

    @property
    def regions(self) -> int:
        """Regions of the device: bits of the map."""
        return -(-self.size // self.region)

    def pack(self) -> bytes:
        """Its block."""
        whole = self.is_whole | self.unused << 1
        body = self._STRUCT.pack(
            self.size, self.length, self.region, whole, self.restoring, self.uuid.bytes, self.name.encode(),
        )  # fmt: skip
        return _pack(_Kind.IDENTITY, body)

    @classmethod
    def unpack(cls, block: bytes) -> Self | None:
        """None: it is no such block, or damaged."""
        body = _unpack(_Kind.IDENTITY, block, cls._STRUCT)
        if not body:
            return None
        size, length, region, whole, restoring, uid, name = body
        uid, name = UUID(bytes=uid), _text(name)
        return cls(size, length, region, uid, name, bool(whole & 1), bool(restoring), bool(whole & 2))


@dataclass(frozen=True)
class Claim:
    """Somebody has taken the device, for the epoch-th time that it was taken. He alone writes this, once."""

    epoch: int
    owner: UUID  # a pool file, of one boot of one host
    lease_ms: int  # how long others leave it to him without seeing it renewed
    since: int  # seconds since 1970, by his clock: for people
    host: str

    _STRUCT = struct.Struct("<QQQ16s64s")

    def pack(self) -> bytes:
        """Its block."""
        body = self._STRUCT.pack(self.epoch, self.lease_ms, self.since, self.owner.bytes, _bytes(self.host))
        return _pack(_Kind.CLAIM, body)

    @classmethod
    def unpack(cls, block: bytes) -> Self | None:
        """None: it is no such block, or damaged."""
        body = _unpack(_Kind.CLAIM, block, cls._STRUCT)
        if not body:
            return None
        epoch, lease_ms, since, owner, host = body
        return cls(epoch, UUID(bytes=owner), lease_ms, since, _text(host))


@dataclass(frozen=True)
class Renewal:
    """Whoever claimed that epoch is alive, or has let go. He alone writes this."""

    epoch: int
    owner: UUID
    at_ms: int  # by his clock: another one each time
    state: State = State.HELD
    heir: UUID | None = None  # of what was released: he alone may take it at once

    _STRUCT = struct.Struct("<QQQ16s16s")

    def pack(self) -> bytes:
        """Its block."""
        heir = self.heir.bytes if self.heir else bytes(16)
        body = self._STRUCT.pack(self.epoch, self.at_ms, self.state, self.owner.bytes, heir)
        return _pack(_Kind.RENEWAL, body)

    @classmethod
    def unpack(cls, block: bytes) -> Self | None:
        """None: it is no such block, or damaged."""
        body = _unpack(_Kind.RENEWAL, block, cls._STRUCT)
        if not body or body[2] not in list(State):
            return None
        epoch, at_ms, state, owner, heir = body
        return cls(epoch, UUID(bytes=owner), at_ms, State(state), UUID(bytes=heir) if heir.strip(b"\0") else None)


@dataclass(frozen=True)
class Request:
    """Somebody who stands by asks the owner of an epoch to let go."""

    epoch: int
    asker: UUID
    host: str

    _STRUCT = struct.Struct("<Q16s64s")

    def pack(self) -> bytes:
        """Its block."""
        return _pack(_Kind.REQUEST, self._STRUCT.pack(self.epoch, self.asker.bytes, _bytes(self.host)))

    @classmethod
    def unpack(cls, block: bytes) -> Self | None:
        """None: it is no such block, or damaged."""
        body = _unpack(_Kind.REQUEST, block, cls._STRUCT)
        return cls(body[0], UUID(bytes=body[1]), _text(body[2])) if body else None


def _bytes(text: str) -> bytes:
    return text.encode()[:63]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _pack(kind: _Kind, body: bytes) -> bytes:
    """All of it lies in the first sector, which a disk writes whole or not at all."""
    record = _HEAD.pack(MAGIC, VERSION, kind) + body
    return (record + _CRC.pack(crc32c(record))).ljust(BLOCK, b"\0")


def _unpack(kind: _Kind, block: bytes, layout: struct.Struct) -> tuple[Any, ...] | None:
    end = _HEAD.size + layout.size
    if len(block) < end + _CRC.size or _HEAD.unpack_from(block) != (MAGIC, VERSION, kind):
        return None
    if _CRC.unpack_from(block, end)[0] != crc32c(block[:end]):
        return None
    return layout.unpack_from(block, _HEAD.size)


@dataclass(frozen=True)
class Ownership:
    """Who has the device, as it was read in one go.

    `seen` is the same again as long as nobody has claimed, renewed or released it.
    """

    claim: Claim
    renewal: Renewal | None  # of that claim; None: none yet
    request: Request | None  # to that claim
    seen: bytes

    @property
    def is_released(self) -> bool:
        """Whether whoever claimed it has let go."""
        return self.renewal is not None and self.renewal.state is State.RELEASED

    @property
    def heir(self) -> UUID | None:
        """To whom he let go: he alone may have it at once."""
        return self.renewal.heir if self.renewal and self.is_released else None


def tail_bytes(length: int) -> int:
    """How many bytes at the end of a backing of *length* bytes are not the device's, among them what is no block."""
    blocks = length // BLOCK
    return length - (blocks - _MAP - -(-length // _MAP_COVERS) - 1) * BLOCK


def length_for(size: int) -> int:
    """The least length of a backing that has room for *size* bytes of a device and a tail."""
    blocks = -(-size // BLOCK) * BLOCK
    length = blocks + tail_bytes(blocks)
    while length - tail_bytes(length) < size:  # the tail's own blocks may need one more of the map
        length += BLOCK
    return length


class Tail:
    """The tail of a store."""

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store = store
        self.identity = identity
        self._at = store.size - tail_bytes(store.size)

    @property
    def map_offset(self) -> int:
        """Where in the store the map begins: one bit for each region, the least significant first; 1: not trusted."""
        return self._at + _MAP * BLOCK

    @property
    def mark(self) -> tuple[int, bytes]:
        """What tells the store from any other: where, and at most 512 bytes."""
        return self._at + (self.blocks - 1) * BLOCK, self.identity.pack()[:512]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return tail_bytes(self.store.size) // BLOCK

    def _write(self, block: int, data: bytes, *, durable: bool) -> None:
        self.store.write(self._at + block * BLOCK, data, durable=durable)

    def create(self, claim: Claim, *, trusted: bool) -> None:
        """Write all of it, claimed; a process that is killed meanwhile leaves none.

        All bits of the map are clear where the backing is *trusted* (it holds zeros), else set.
        """
        last = self.blocks - 1
        self._write(last, replace(self.identity, is_whole=False).pack(), durable=True)
        self._write(_IDENTITY, bytes((last - _IDENTITY) * BLOCK), durable=False)
        if not trusted:
            self._write(_MAP, bytes([255]) * ((last - _MAP) * BLOCK), durable=False)
        self.write_claim(claim)
        self.store.flush()
        self._write(_IDENTITY, self.identity.pack(), durable=True)
        self._write(last, self.identity.pack(), durable=True)

    def erase(self) -> None:
        """Have none again. Raises OSError."""
        self.store.write(self._at, bytes(self.blocks * BLOCK), durable=True)

    def check(self) -> None:
        """Raise PoolError where it is not the one that we have made, or found. Raises OSError."""
        if _find_identity(self.store, self.identity.name) != self.identity:
            raise PoolError(f"{self.identity.name}: another host has changed its tail just now: try again")

    def note(self, *, restoring: bool, unused: bool) -> None:
        """Say whether the device is being restored, and whether nobody has served it yet. Raises OSError."""
        if (self.identity.restoring, self.identity.unused) == (restoring, unused):
            return
        self.identity = replace(self.identity, restoring=restoring, unused=unused)
        for block in (_IDENTITY, self.blocks - 1):
            self._write(block, self.identity.pack(), durable=True)

    def ownership(self) -> Ownership:
        """Who has it. Raises OSError, PoolError."""
        data = self.store.read(self._at + _CLAIMS * BLOCK, (_MAP - _CLAIMS) * BLOCK)
        blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
        claims = [claim for block in blocks[:2] if (claim := Claim.unpack(block))]
        if not claims:
            raise PoolError("nobody can tell who has it: what says so in its tail is damaged")
        claim = max(claims, key=lambda one: one.epoch)
        renewal = Renewal.unpack(blocks[_RENEWALS - _CLAIMS + claim.epoch % 2])
        request = Request.unpack(blocks[-1])
        is_his = renewal is not None and (renewal.epoch, renewal.owner) == (claim.epoch, claim.owner)
        is_to_him = request is not None and request.epoch == claim.epoch
        seen = data[:-BLOCK]
        return Ownership(claim, renewal if is_his else None, request if is_to_him else None, seen)

    def write_claim(self, claim: Claim) -> None:
        """Claim it, durably: in the block that does not hold the claim before."""
        self._write(_CLAIMS + claim.epoch % 2, claim.pack(), durable=True)

    def write_renewal(self, renewal: Renewal) -> None:
        """Renew a claim, or release it, which is durable.

        Each second epoch has the same block: who was late with it changes nothing of his successor's.
        """
        durable = renewal.state is State.RELEASED
        self._write(_RENEWALS + renewal.epoch % 2, renewal.pack(), durable=durable)

    def write_request(self, request: Request) -> None:
        """Ask for it."""
        self._write(_REQUEST, request.pack(), durable=False)

    def read_bits(self) -> list[bool]:
        """For each region, whether its bit is set: the backing is not to be trusted there. Raises OSError."""
        data = self.store.read(self.map_offset, -(-self.identity.map_bytes // BLOCK) * BLOCK)
        return [bool(data[i // 8] >> i % 8 & 1) for i in range(self.identity.regions)]


def find(store: Store, where: str) -> Tail | None:
    """The tail of a store; None where there is none, or one that nobody finished.

    Raises OSError, and PoolError, naming *where*, for one of another version, or that contradicts itself.
    """
    identity = _find_identity(store, where)
    return Tail(store, identity) if identity and identity.is_whole else None


def is_unfinished(store: Store) -> bool:
    """Whether somebody began to make a tail, and was killed. Raises OSError."""
    identity = _find_identity(store, "")
    return identity is not None and not identity.is_whole


def _find_identity(store: Store, where: str) -> Identity | None:
    """Either copy of it says what there is to know; the last was the last to be written."""
    at, end = store.size - tail_bytes(store.size), store.size // BLOCK * BLOCK
    if at < 0:
        return None
    blocks = [store.read(end - BLOCK, BLOCK), store.read(at, BLOCK)]
    found = [identity for block in blocks if (identity := Identity.unpack(block))]
    if not found:
        _check_version(blocks, where)
        return None
    identity = found[0]
    if identity.length != store.size or identity.size > at or not identity.region or identity.region % BLOCK:
        raise PoolError(f"{where}: its tail is of a backing of {identity.length} bytes, and it has {store.size}")
    return identity


def _check_version(blocks: list[bytes], where: str) -> None:
    for block in blocks:
        magic, version, _ = _HEAD.unpack_from(block)
        if magic == MAGIC and version != VERSION:
            raise PoolError(f"{where}: tail format version {version}, this tmemd reads version {VERSION}")
    if any(block.startswith(MAGIC) for block in blocks):
        raise PoolError(f"{where}: both copies of its tail's identity are damaged (checksum mismatch)")
