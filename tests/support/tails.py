# SPDX-License-Identifier: BSD-3-Clause
"""Tails in memory."""

from __future__ import annotations

import uuid

from tests.support.harness import MIB
from tmemd.store import tail
from tmemd.store.bitmapfile import REGION
from tmemd.store.tail import Claim, Identity, Tail

SIZE = MIB


class MemoryStore:
    """A store that is bytes in memory."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def identity(self) -> Identity:
        found = tail.find(self, "memory")
        assert found
        return found.identity

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:  # noqa: ARG002
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


def identity_for(length: int, name: str = "device") -> Identity:
    """Of a device that has all that a backing of *length* bytes has room for."""
    return Identity(length - tail.tail_bytes(length), length, REGION, uuid.uuid4(), name)


def new_tail(store: MemoryStore) -> Tail:
    """One that nobody owns any more."""
    made = Tail(store, identity_for(store.size))
    claim = Claim(1, uuid.uuid4(), 20_000, 0, "maker")
    made.create(claim, trusted=True)
    made.write_renewal(tail.Renewal(1, claim.owner, 0, tail.State.RELEASED))
    return made
