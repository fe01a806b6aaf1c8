# SPDX-License-Identifier: BSD-3-Clause
"""Messages of the vhost-user protocol (QEMU: docs/interop/vhost-user.rst), and memory that a guest shares."""

from __future__ import annotations

import enum
import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import nbd

DEADLINE = 60.0  # seconds; only a guard against a hang
VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3  # flags of a message
NO_FD = 1 << 8  # in the payload of SET_VRING_KICK, CALL and ERR, beside the queue's number
HEADER = struct.Struct("=III")  # request, flags, size of the payload
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDRESSES = struct.Struct(
    "=IIQQQQ"
)  # index, flags; where the VMM has descriptors, used ring, available ring, log
REGION = struct.Struct("=QQQQ")  # the guest's address, size, the VMM's address, offset in the file
CONFIG = struct.Struct("=III")  # offset, size, flags
INFLIGHT = struct.Struct("=QQHH")  # size and offset of the mapping, number of queues, their size


class Message(enum.IntEnum):
    """What a front end may ask for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34


class Protocol(enum.IntFlag):
    """Features of the protocol."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13


class Feature(enum.IntFlag):
    """Features of the device (virtio 1.2, 5.2.3 and 6), and that there are features of the protocol."""

    SEG_MAX = 1 << 2
    READ_ONLY = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


def gone() -> nbd.Error:
    """The error of whoever still waits for a back end that closed the connection."""
    return nbd.Error("the back end closed the connection", errno.ESHUTDOWN)


class Connection:
    """A connection to a back end; no wait is longer than *deadline* seconds (TimeoutError)."""

    def __init__(self, sock: socket.socket, deadline: float = DEADLINE) -> None:
        self.socket = sock
        self.acknowledged = False  # whether REPLY_ACK was agreed on, so that `tell` waits and learns of a failure
        sock.settimeout(deadline)

    @classmethod
    def to(cls, path: Path, deadline: float = DEADLINE) -> Self:
        """A new one to the back end that listens there, or soon will."""
        end = time.monotonic() + deadline
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
                return cls(sock, deadline)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def close(self) -> None:
        """Leave; no harm when it is closed already."""
        self.socket.close()

    def send(
        self, message: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION, size: int | None = None
    ) -> None:
        """Send anything. *size* is what the header says of the payload's, if that is to be a lie."""
        header = HEADER.pack(message, flags, len(payload) if size is None else size)
        try:
            socket.send_fds(self.socket, [header + payload], fds)
        except (BrokenPipeError, ConnectionResetError):
            raise gone() from None

    def receive(self, message: int) -> tuple[bytes, list[int]]:
        """The payload of the reply to *message*, and the files that came with it, which are the caller's to close."""
        header, fds = self._exactly(HEADER.size)
        request, flags, size = HEADER.unpack(header)
        assert (request, flags & ~NEED_REPLY) == (message, VERSION | REPLY), f"{request:#x}, {flags:#x}: no reply"
        payload, more = self._exactly(size)
        return payload, fds + more

    def _exactly(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", list[int]()
        while len(data) < size:
            try:
                piece, new, _, _ = socket.recv_fds(self.socket, size - len(data), 8)
            except ConnectionResetError:
                raise gone() from None
            fds += new
            if not piece:
                raise gone()
            data += piece
        return data, fds

    def ask(self, message: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a *message* that has a reply; returns its payload."""
        self.send(message, payload, fds)
        return self.receive(message)[0]

    def tell(self, message: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a *message* that has no reply, or just an acknowledgement: nbd.Error if it failed."""
        self.send(message, payload, fds, VERSION | (NEED_REPLY if self.acknowledged else 0))
        if self.acknowledged:
            (failed,) = U64.unpack(self.receive(message)[0])
            if failed:
                raise nbd.Error(f"the back end refused message {message}", errno.EINVAL)

    def get(self, message: Message) -> int:
        """Ask for a number."""
        return int(U64.unpack(self.ask(message))[0])

    def set(self, message: Message, number: int, fds: Sequence[int] = ()) -> None:
        """Tell a number."""
        self.tell(message, U64.pack(number), fds)

    def set_vring(self, message: Message, queue: int, number: int) -> None:
        """Tell a number of a queue."""
        self.tell(message, VRING_STATE.pack(queue, number))

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space; nbd.Error if the back end gives none."""
        payload = self.ask(Message.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(size))
        if len(payload) != CONFIG.size + size:
            raise nbd.Error("the back end gave no configuration", errno.EINVAL)
        return payload[CONFIG.size :]

    def set_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space."""
        self.tell(Message.SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data)


class Memory:
    """What a guest shares with its back end: a memfd, mapped here.

    Where the guest has it, where the VMM has it, and where it is in the file are unlike, and so they are in QEMU. All
    that takes or returns a place here takes or returns its offset.
    """

    GUEST, USER = 0x1_0000_0000, 0x7E00_0000_0000

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, mmap.PAGESIZE + self.size)
        self._map = mmap.mmap(self.fd, self.size, offset=mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("H")
        self._taken = 0

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()
        os.close(self.fd)

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Room for so many bytes, which are zeros."""
        start = -(-self._taken // alignment) * alignment
        self._taken = start + size
        assert self._taken <= self.size
        return start

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of it."""
        return self._map[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Change them."""
        self._map[offset : offset + len(data)] = data

    def word(self, offset: int) -> int:
        """The 16 bits there, in one load."""
        return self._words[offset // 2]

    def set_word(self, offset: int, value: int) -> None:
        """Change them, in one store."""
        self._words[offset // 2] = value & 0xFFFF

    def table(self) -> bytes:
        """The payload of SET_MEM_TABLE, with which `fd` goes."""
        return VRING_STATE.pack(1, 0) + REGION.pack(self.GUEST, self.size, self.USER, mmap.PAGESIZE)
