# SPDX-License-Identifier: BSD-3-Clause
"""A virtio block device as a guest's driver has it (virtio 1.2, 5.2), used as our tests use `nbd.NBD`."""

from __future__ import annotations

import enum
import errno
import itertools
import os
import select
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nbd

from tests.support.vhost.protocol import DEADLINE, INFLIGHT, Connection, Feature, Memory, Message, Protocol, gone
from tests.support.vhost.virtqueue import DESCRIPTOR, INDIRECT, NEXT, WRITE, Virtqueue

SECTOR = 512
CONFIG_SIZE = 60
LARGEST = 1 << 20  # bytes of a request; longer ones are several
SEGMENT = 64 << 10  # bytes of a descriptor, where a request's are in an indirect table
HEADER = struct.Struct("<IIQ")  # type, reserved, sector
RANGE = struct.Struct("<QII")  # first sector, number of sectors, flags
UNMAP = 1
WANTED = (
    Feature.SEG_MAX | Feature.READ_ONLY | Feature.BLK_SIZE | Feature.FLUSH | Feature.CONFIG_WCE | Feature.MQ
    | Feature.DISCARD | Feature.WRITE_ZEROES | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)  # fmt: skip
ERRORS = {1: errno.EIO, 2: errno.EOPNOTSUPP}  # of a status


class Kind(enum.IntEnum):
    """Types of requests."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Config(NamedTuple):
    """What the configuration space says."""

    sectors: int
    seg_max: int
    block_size: int
    writeback: bool
    queues: int
    discard_sectors: int
    discard_segments: int
    zeroes_sectors: int
    zeroes_segments: int
    zeroes_may_unmap: bool

    @classmethod
    def parse(cls, space: bytes) -> Config:
        """Read it."""
        sectors, _, seg_max = struct.unpack_from("<QII", space, 0)
        (block_size,) = struct.unpack_from("<I", space, 20)
        writeback, queues = struct.unpack_from("<BxH", space, 32)
        limits = struct.unpack_from("<IIIIIB", space, 36)
        discard_sectors, discard_segments, _, zeroes_sectors, zeroes_segments, may_unmap = limits
        return cls(
            sectors, seg_max, block_size, bool(writeback), queues, discard_sectors, discard_segments, zeroes_sectors,
            zeroes_segments, bool(may_unmap),
        )  # fmt: skip


class Slot(NamedTuple):
    """Room for one request of a queue: the chain's *head*, and where in memory its parts are."""

    queue: Virtqueue
    head: int
    header: int
    status: int
    table: int
    data: int


@dataclass
class Pending:
    """A request that was sent. *data* is what was read, once it is done."""

    slot: Slot
    kind: Kind
    size: int  # of the data
    status: int | None = None
    data: bytes = b""


class Disk:
    """The device behind *path*, through some *queues* of which each has *size* descriptors. One thread may use it.

    What fails is an nbd.Error, as over NBD: a status that is not OK, or a back end that has gone, after which
    `reconnect` takes everything up where it was. A wait longer than `deadline` seconds is a TimeoutError, and a back
    end that completes what it was not given an AssertionError.
    """

    def __init__(
        self, path: Path, *, queues: int = 1, size: int = 64, refuse: int = 0, deadline: float = DEADLINE
    ) -> None:
        self._path, self.deadline = path, deadline
        self._wanted = WANTED & ~refuse
        self.connection = Connection.to(path, deadline)
        try:
            self._negotiate()
            self._make_queues(queues, size)
            self._inflight: tuple[bytes, int] | None = None
            self._start()
        except BaseException:
            self.connection.close()
            raise

    # What it takes to have a device.

    def _negotiate(self) -> None:
        ask = self.connection
        self.features = Feature(ask.get(Message.GET_FEATURES) & self._wanted)
        assert {Feature.VERSION_1, Feature.PROTOCOL_FEATURES} <= set(self.features)
        self.protocol = Protocol(ask.get(Message.GET_PROTOCOL_FEATURES) & sum(Protocol))
        ask.set(Message.SET_PROTOCOL_FEATURES, self.protocol)
        ask.acknowledged = Protocol.REPLY_ACK in self.protocol
        ask.tell(Message.SET_OWNER)
        self.config = Config.parse(ask.get_config(0, CONFIG_SIZE))

    def _make_queues(self, queues: int, size: int) -> None:
        per_request = 4096 + LARGEST
        room = queues * (size // 3 * per_request + 64 * size + 4096)
        self.memory = Memory(room)
        event_idx = Feature.EVENT_IDX in self.features
        self.queues = [Virtqueue(self.memory, number, size, event_idx=event_idx) for number in range(queues)]
        self._free = {queue.number: [self._slot(queue, 3 * n) for n in range(size // 3)] for queue in self.queues}
        self._pending: dict[tuple[int, int], Pending] = {}
        self._turns = itertools.cycle(self.queues)

    def _slot(self, queue: Virtqueue, head: int) -> Slot:
        start = self.memory.allocate(4096 + LARGEST, 4096)
        return Slot(queue, head, start, start + HEADER.size, start + 64, start + 4096)

    def _start(self) -> None:
        tell = self.connection
        if Protocol.INFLIGHT_SHMFD in self.protocol:
            self._keep_inflight()
        tell.set(Message.SET_FEATURES, self.features)
        tell.tell(Message.SET_MEM_TABLE, self.memory.table(), [self.memory.fd])
        for queue in self.queues:
            # After a back end's end nobody else can say how far it was; what it had begun is in the inflight region.
            queue.start(tell, queue.used_index())
            tell.set_vring(Message.SET_VRING_ENABLE, queue.number, 1)

    def _keep_inflight(self) -> None:
        if self._inflight is None:
            self.connection.send(Message.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, len(self.queues), self.queues[0].size))
            payload, (fd,) = self.connection.receive(Message.GET_INFLIGHT_FD)
            self._inflight = payload, fd
        payload, fd = self._inflight
        self.connection.tell(Message.SET_INFLIGHT_FD, payload, [fd])

    def reconnect(self) -> None:
        """Take up the device with a back end that was started anew: what was not completed is its to complete."""
        self.connection.close()
        self.connection = Connection.to(self._path, self.deadline)
        self._negotiate()
        self._start()
        for queue in self.queues:
            os.eventfd_write(queue.kick, 1)

    def stop_queues(self) -> list[int]:
        """Stop the queues, as for a migration; returns where the back end was in each. `resume` starts them again."""
        bases = []
        for queue in self.queues:
            payload = self.connection.ask(Message.GET_VRING_BASE, struct.pack("=II", queue.number, 0))
            bases.append(struct.unpack("=II", payload)[1])
        return bases

    def resume(self, bases: Iterable[int]) -> None:
        """Start stopped queues again, from there."""
        for queue, base in zip(self.queues, bases, strict=True):
            queue.start(self.connection, base)
            self.connection.set_vring(Message.SET_VRING_ENABLE, queue.number, 1)
            os.eventfd_write(queue.kick, 1)

    def shutdown(self) -> None:
        """Leave, and let go of everything."""
        self.connection.close()
        for queue in self.queues:
            queue.close()
        if self._inflight:
            os.close(self._inflight[1])
        self.memory.close()

    # Requests.

    @property
    def under_way(self) -> int:
        """How many requests were sent that were not seen to be completed."""
        return len(self._pending)

    def submit(self, kind: Kind, sector: int = 0, data: bytes = b"", size: int = 0) -> Pending:
        """Send a request that carries *data*, or has *size* bytes to fill, by the queue whose turn it is."""
        queue = next(self._turns)
        free = self._free[queue.number]
        while not free:
            self._await_completion()
        slot = free.pop()
        pending = self._pending[queue.number, slot.head] = Pending(slot, kind, len(data) or size)
        self.memory.write(slot.header, HEADER.pack(kind, 0, sector) + b"\xff")
        self.memory.write(slot.data, data)
        self._describe(slot, pending.size, WRITE if size else 0)
        queue.publish(slot.head)
        queue.notify(1)
        return pending

    def _describe(self, slot: Slot, size: int, flags: int) -> None:
        indirect = Feature.INDIRECT_DESC in self.features
        step = SEGMENT if indirect else LARGEST
        parts = [(slot.header, HEADER.size, 0)]
        parts += [(slot.data + at, min(step, size - at), flags) for at in range(0, size, step)]
        parts += [(slot.status, 1, WRITE)]
        first = 0 if indirect else slot.head
        chain = [
            (Memory.GUEST + offset, length, flags | NEXT, first + n)
            for n, (offset, length, flags) in enumerate(parts, 1)
        ]
        chain[-1] = *chain[-1][:2], WRITE, 0
        if indirect:
            table = b"".join(itertools.starmap(DESCRIPTOR.pack, chain))
            self.memory.write(slot.table, table)
            slot.queue.describe(slot.head, Memory.GUEST + slot.table, len(table), INDIRECT)
        else:
            for n, descriptor in enumerate(chain):
                slot.queue.describe(slot.head + n, *descriptor)

    def submit_read(self, count: int, offset: int) -> Pending:
        """Send a request to read at most LARGEST bytes."""
        return self.submit(Kind.IN, offset // SECTOR, size=count)

    def submit_write(self, buf: bytes, offset: int) -> Pending:
        """Send a request to write at most LARGEST bytes."""
        return self.submit(Kind.OUT, offset // SECTOR, buf)

    def submit_trim(self, count: int, offset: int) -> Pending:
        """Send a request to discard."""
        return self.submit(Kind.DISCARD, 0, RANGE.pack(offset // SECTOR, count // SECTOR, 0))

    def wait(self, pending: Pending) -> bytes:
        """What was read, once a request is done; nbd.Error if it failed."""
        while pending.status is None:
            self._await_completion()
        if pending.status:
            code = ERRORS.get(pending.status, errno.EPROTO)
            raise nbd.Error(f"{pending.kind.name}: status {pending.status}: {os.strerror(code)}", code)
        return pending.data

    def _await_completion(self) -> None:
        """Return when something was completed; nbd.Error when nothing will ever be."""
        end = time.monotonic() + self.deadline
        while not self._reap():
            if any(queue.want_call() for queue in self.queues):
                continue
            ready = self._poll(end - time.monotonic())
            if not ready:
                raise TimeoutError(f"waited {self.deadline:.0f} s in vain for {len(self._pending)} requests")
            if self.connection.socket.fileno() in ready and not self._reap():
                raise gone()

    def _poll(self, seconds: float) -> set[int]:
        poll = select.poll()
        calls = {queue.call for queue in self.queues}
        for fd in (*calls, self.connection.socket.fileno()):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, seconds * 1000))}
        for fd in calls & ready:
            os.eventfd_read(fd)
        return ready

    def _reap(self) -> int:
        """Take note of all that was completed; returns of how many requests."""
        number = 0
        for queue in self.queues:
            for head, written in queue.completed():
                pending = self._pending.pop((queue.number, head), None)
                assert pending, f"queue {queue.number}: what was completed with head {head} is not under way"
                self._complete(pending, written)
                number += 1
        return number

    def _complete(self, pending: Pending, written: int) -> None:
        slot, reads = pending.slot, pending.kind in (Kind.IN, Kind.GET_ID)
        assert written <= 1 + (pending.size if reads else 0), f"{written} bytes written by {pending.kind.name}"
        pending.status = self.memory.read(slot.status, 1)[0]
        if reads:
            pending.data = self.memory.read(slot.data, pending.size)
        self._free[slot.queue.number].append(slot)

    # As nbd.NBD has it. Offsets and sizes are in bytes, whole sectors of them.

    def get_size(self) -> int:
        """The device's size."""
        return self.config.sectors * SECTOR

    def is_read_only(self) -> bool:
        """Whether nobody can write to it."""
        return Feature.READ_ONLY in self.features

    def pread(self, count: int, offset: int, flags: int = 0) -> bytes:
        """Read; there are no *flags*."""
        assert not flags
        parts = [self.submit_read(size, at) for at, size in _requests(offset, count)]
        return b"".join([self.wait(each) for each in parts])

    def pwrite(self, buf: bytes, offset: int, flags: int = 0) -> None:
        """Write. With FUA, which virtio has not, it is flushed afterwards, as Linux does."""
        buf = bytes(buf)
        pieces = _requests(offset, len(buf))
        self._end([self.submit_write(buf[at - offset :][:size], at) for at, size in pieces], flags)

    def trim(self, count: int, offset: int, flags: int = 0) -> None:
        """Discard."""
        pieces = _requests(offset, count, self.config.discard_sectors * SECTOR)
        self._end([self.submit_trim(size, at) for at, size in pieces], flags)

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """Write zeros, which may leave a hole unless NO_HOLE is among the *flags*."""
        unmap = 0 if flags & nbd.CMD_FLAG_NO_HOLE else UNMAP
        pieces = _requests(offset, count, self.config.zeroes_sectors * SECTOR)
        ranges = [RANGE.pack(at // SECTOR, size // SECTOR, unmap) for at, size in pieces]
        self._end([self.submit(Kind.WRITE_ZEROES, 0, each) for each in ranges], flags)

    def flush(self, flags: int = 0) -> None:
        """Make durable what was acknowledged; there are no *flags*."""
        assert not flags
        self.wait(self.submit(Kind.FLUSH))

    def get_id(self) -> bytes:
        """The serial number."""
        return self.wait(self.submit(Kind.GET_ID, size=20)).rstrip(b"\0")

    def _end(self, parts: list[Pending], flags: int) -> None:
        for each in parts:
            self.wait(each)
        if flags & nbd.CMD_FLAG_FUA:
            self.flush()


def _requests(offset: int, count: int, largest: int = LARGEST) -> list[tuple[int, int]]:
    """Offsets and sizes of requests that together are for *count* bytes at *offset*."""
    assert offset % SECTOR == count % SECTOR == 0, f"{count} bytes at {offset} are not whole sectors"
    return [(at, min(largest, offset + count - at)) for at in range(offset, offset + count, largest)]
