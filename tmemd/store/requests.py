# SPDX-License-Identifier: BSD-3-Clause
"""What a pool's plugin is asked to do, and its answers: two rings of numbered slots in the pool file.

Requests stand in the control page, behind its words; tmemd writes them, or tmemctl. Answers stand in the
second half of the counters page; the serving plugin writes them. It takes requests in the order of their numbers, and
one that has no answer yet is still to be done, whoever was killed meanwhile. docs/pool-format.md has the layout.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from typing import Final

from crc32c import crc32c

from tmemd.store.poolfile import CONTROL_BYTES, CONTROL_OFFSET, COUNTERS_OFFSET, GENERATIONS, PAGE, PoolError, Snapshot

SLOTS: Final = 16
_BOUND: Final = 1 << 63  # of numbers
_RAW_ONLY: Final = 1 << 8


class Request(enum.IntEnum):
    """What can be asked."""

    DRAIN = 1
    DEMOTE = 2
    COMPACT = 3
    FLUSH = 4  # of an ephemeral pool: let go of all pages
    HANDOVER = 5  # of a device that is written back: be durable from now on, for another host is to serve the file
    HANDBACK = 6  # and be written back again


@dataclass(frozen=True)
class Choice:
    """Which pages a DEMOTE request is about."""

    min_age: int = 0  # generations, below GENERATIONS
    raw_only: bool = False  # only incompressible ones

    def pack(self) -> int:
        """As the word of a request."""
        return self.min_age | (_RAW_ONLY if self.raw_only else 0)

    @classmethod
    def unpack(cls, word: int) -> Choice:
        """From the word of a request."""
        return cls(word % GENERATIONS, bool(word & _RAW_ONLY))


ANY_PAGE: Final = Choice()


@dataclass(frozen=True)
class Queued:
    """A request that has no answer yet."""

    number: int
    op: int  # a Request, or what a newer version knows
    argument: int  # bytes, for DEMOTE
    choice: Choice


class _Ring:
    """Slots of 64-bit words, the first a number, which says which slot it goes to, and a checksum.

    A slot that is torn, or was never written, holds nothing.
    """

    def __init__(self, offset: int, words: int) -> None:
        self._offset = offset
        self._body = struct.Struct(f"<{words}Q")
        self._slot = self._body.size + 8
        self._size = SLOTS * self._slot

    def read(self, fd: int) -> dict[int, tuple[int, ...]]:
        """What the slots hold, by number."""
        return self._unpack(os.pread(fd, self._size, self._offset).ljust(self._size, b"\0"))

    def of(self, pool: Snapshot) -> dict[int, tuple[int, ...]]:
        """The same, as it was when the snapshot was taken."""
        return self._unpack(pool.part(self._offset, self._size))

    def _unpack(self, data: bytes | bytearray) -> dict[int, tuple[int, ...]]:
        found = {}
        for start in range(0, self._size, self._slot):
            body, crc = bytes(data[start:][: self._body.size]), data[start + self._body.size :][:8]
            number, *words = self._body.unpack(body)
            # The pool belongs to another user, who can write anything: the next number must fit as well.
            if number < _BOUND and int.from_bytes(crc, "little") == crc32c(body):
                found[number] = tuple(words)
        return found

    def write(self, fd: int, number: int, *words: int) -> None:
        """Fill the number's slot."""
        body = self._body.pack(number, *words)
        slot = body + crc32c(body).to_bytes(8, "little")
        os.pwrite(fd, slot, self._offset + number % SLOTS * self._slot)


_requests: Final = _Ring(CONTROL_OFFSET + CONTROL_BYTES, 4)
_answers: Final = _Ring(COUNTERS_OFFSET + PAGE // 2, 2)


def ask(fd: int, request: Request, argument: int = 0, choice: Choice = ANY_PAGE) -> int:
    """Ask the serving plugin for something; returns the number that its answer will have.

    *argument* is a number of bytes for DEMOTE, *choice* which pages. The caller controls the directory. Raises
    PoolError when SLOTS requests are still to be done.
    """
    answered = max(_answers.read(fd), default=0)
    last = max(_requests.read(fd), default=0)
    if last - answered >= SLOTS:
        raise PoolError(f"{SLOTS} requests are waiting to be done already, and more find no room: try again later")
    number = max(last, answered) + 1
    _requests.write(fd, number, request, argument, choice.pack())
    return number


def waiting(pool: Snapshot) -> list[Queued]:
    """The requests that were still to be done, in the order in which they were made."""
    answered = max(_answers.of(pool), default=0)
    return [
        Queued(number, op, argument, Choice.unpack(choice))
        for number, (op, argument, choice) in sorted(_requests.of(pool).items())
        if number > answered
    ]


def answer(fd: int, number: int, error: int) -> None:
    """Note that a request was carried out, with this errno (0: success); so are all before it."""
    _answers.write(fd, number, error)


def answer_to(fd: int, number: int) -> int | None:
    """The errno of a request that was carried out, 0 for success; None: it was not yet.

    Raises PoolError when so many were carried out since that its answer is gone.
    """
    answers = _answers.read(fd)
    if number in answers:
        return answers[number][0]
    if number < max(answers, default=0):
        raise PoolError(f"request {number} was carried out, but {SLOTS} more since, and its answer is gone: ask again")
    return None
