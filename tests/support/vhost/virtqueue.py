# SPDX-License-Identifier: BSD-3-Clause
"""A split virtqueue as a driver has it (virtio 1.2, 2.7)."""

from __future__ import annotations

import os
import struct
import threading

from tests.support.vhost.protocol import NO_FD, VRING_ADDRESSES, Connection, Memory, Message

DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next
USED = struct.Struct("<II")  # the chain's head, bytes written
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_NOTIFY = NO_INTERRUPT = 1  # flags of a ring


class Virtqueue:
    """One queue: its rings in *memory*, and the eventfds `kick` (to the back end) and `call` (from it).

    Whether the other side wants to be told is looked at only after what it would be told of was stored, and the other
    way round. A processor may do a load before an earlier store of its own, unless an instruction with a lock prefix
    lies in between: here that is taking and leaving a lock.
    """

    def __init__(self, memory: Memory, number: int, size: int, *, event_idx: bool) -> None:
        self.number, self.size = number, size
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.descriptors = memory.allocate(size * DESCRIPTOR.size, 16)
        self.available = memory.allocate(4 + 2 * size + 2, 2)
        self.used = memory.allocate(4 + USED.size * size + 2, 4)
        self.next = 0  # the index of the available ring, as last published
        self.seen = 0  # how far the used ring was looked at
        self._memory, self._event_idx = memory, event_idx
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the eventfds."""
        os.close(self.kick)
        os.close(self.call)

    def start(self, connection: Connection, base: int) -> None:
        """Hand the queue over to a back end, which is to begin at *base* of the available ring."""
        connection.set_vring(Message.SET_VRING_NUM, self.number, self.size)
        connection.set_vring(Message.SET_VRING_BASE, self.number, base)
        addresses = (Memory.USER + offset for offset in (self.descriptors, self.used, self.available))
        connection.tell(Message.SET_VRING_ADDR, VRING_ADDRESSES.pack(self.number, 0, *addresses, 0))
        connection.set(Message.SET_VRING_ERR, self.number | NO_FD)
        connection.set(Message.SET_VRING_CALL, self.number, [self.call])
        connection.set(Message.SET_VRING_KICK, self.number, [self.kick])

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor: *address* is the guest's."""
        self._memory.write(
            self.descriptors + index * DESCRIPTOR.size, DESCRIPTOR.pack(address, length, flags, following)
        )

    def publish(self, *heads: int) -> None:
        """Make chains available, without telling."""
        for head in heads:
            self._memory.set_word(self.available + 4 + 2 * (self.next % self.size), head)
            self.next = (self.next + 1) & 0xFFFF
        self._memory.set_word(self.available + 2, self.next)

    def notify(self, published: int) -> None:
        """Tell the back end, if it wants to know of the last *published* chains."""
        if self._wants_kick(published):
            os.eventfd_write(self.kick, 1)

    def _wants_kick(self, published: int) -> bool:
        self._fence()
        if not self._event_idx:
            return not self._memory.word(self.used) & NO_NOTIFY
        event = self._memory.word(self.used + 4 + USED.size * self.size)
        return (self.next - event - 1) & 0xFFFF < published

    def used_index(self) -> int:
        """How far the back end has come."""
        return self._memory.word(self.used + 2)

    def completed(self) -> list[tuple[int, int]]:
        """Heads of the chains that were completed since the last look, and how many bytes were written to each."""
        found = []
        end = self.used_index()
        assert (end - self.seen) & 0xFFFF <= self.size, "the used ring's index went back, or too far"
        while self.seen != end:
            entry = self.used + 4 + USED.size * (self.seen % self.size)
            found.append(USED.unpack(self._memory.read(entry, USED.size)))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    def want_call(self) -> bool:
        """Have `call` written at the next completion; returns whether there is one already."""
        if self._event_idx:
            self._memory.set_word(self.available + 4 + 2 * self.size, self.seen)
        self._fence()
        return self.used_index() != self.seen

    def _fence(self) -> None:
        with self._lock:
            pass
