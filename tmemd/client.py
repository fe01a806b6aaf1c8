# SPDX-License-Identifier: BSD-3-Clause
"""Ask tmemd, or do without it."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from tmemd import protocol
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import PoolError, check_name
from tmemd.store.requests import ANY_PAGE, Choice

_Answer = TypeVar("_Answer", bound=protocol.Answer)
Transport = Callable[[protocol.Request], protocol.Answer]
_CHUNK: Final = 64 * 1024
_TIMEOUT: Final = struct.pack("ll", 10, 0)  # seconds and microseconds, for each system call


class UnreachableError(PoolError):
    """tmemd does not answer; it may be away for a moment. *reason* is what the system said."""

    def __init__(self, message: str, reason: OSError | None = None) -> None:
        super().__init__(message)
        self.reason = reason


def attach_pool(socket_path: Path | str, request: protocol.Attach) -> tuple[int, str]:
    """Have tmemd create or find a pool: its open file, which the caller closes, and its path.

    Raises UnreachableError when no tmemd answers, and PoolError when one refuses.
    """
    answer, fds = _exchange(Path(socket_path), request)
    with ExitStack() as on_error:
        on_error.callback(_close_all, fds)
        attached = _expect(protocol.Attached, answer)
        if len(fds) != 1:
            raise PoolError(f"tmemd ({socket_path}) sent {len(fds)} files with its answer, not one")
        on_error.pop_all()
    return fds[0], attached.path


class Client:
    """What can be asked about pools. Every method raises PoolError, with a line for the user, when it was not done."""

    def __init__(self, transport: Transport, tell: Callable[[str], None] = lambda _: None) -> None:
        """*tell* is called with what should be known of something that was done."""
        self._call = transport
        self._tell = tell

    @classmethod
    def of_daemon(cls, socket_path: Path, tell: Callable[[str], None] = lambda _: None) -> Client:
        """Ask the tmemd that listens there."""

        def call(request: protocol.Request) -> protocol.Answer:
            answer, fds = _exchange(socket_path, request)
            _close_all(fds)
            return answer

        return cls(call, tell)

    @classmethod
    def of_directory(cls, directory: Path) -> Client:
        """Work on the pools of a directory that no tmemd controls."""
        # What attaches through a tmemd needs none of it.
        from tmemd.operations import perform  # noqa: PLC0415
        from tmemd.store.directory import Pools  # noqa: PLC0415

        pools = Pools(directory)
        return cls(lambda request: perform(pools, request))

    def pools(self, *, long: bool = False) -> list[PoolStatus]:
        """All pools that may be seen, by name; *long*: with latencies and ages."""
        return self.listed(long=long).pools

    def listed(self, *, long: bool = False) -> protocol.Listed:
        """The same, with the problems that tmemd has."""
        return _expect(protocol.Listed, self._call(protocol.List(long)))

    def pool(self, name: str, *, long: bool = False, request: int = 0) -> PoolStatus:
        """One pool; *long*: with latencies and ages; *request*: with the answer to that one, by its number."""
        pools = _expect(protocol.Listed, self._call(protocol.Show(check_name(name), long, request))).pools
        if len(pools) != 1:
            raise PoolError(f"there is no pool {name}")
        return pools[0]

    def host(self) -> protocol.HostStatus:
        """What the host can spare; only a tmemd knows."""
        return _expect(protocol.HostStatus, self._call(protocol.Host()))

    def events(self, number: int | None = None, wait: float = 0.0) -> protocol.Happened:
        """What happened after that event (None: nothing, but the number to go on with); only a tmemd remembers.

        Waits for something to happen, for so many seconds at most.
        """
        return _expect(protocol.Happened, self._call(protocol.Events(number, wait)))

    def set(self, name: str, **settings: Any) -> None:
        """Change a pool's settings, all of these or none: the fields of protocol.Set."""
        self._change(protocol.Set(name=check_name(name), **settings))

    def set_target(self, name: str, target: int) -> None:
        """Fix a pool's target, in bytes."""
        self.set(name, target=target)

    def set_frozen(self, name: str | None, frozen: bool) -> None:
        """Freeze or thaw a pool; None: all of them."""
        checked = None if name is None else check_name(name)
        self._change(protocol.Freeze(checked, frozen))

    def ask(self, name: str, work: protocol.Work, nbytes: int = 0, choice: Choice = ANY_PAGE) -> int:
        """Ask the serving plugin for work; returns the number by which `pool` knows its answer, 0 if it is done."""
        request = protocol.Ask(check_name(name), work, nbytes, choice.min_age, choice.raw_only)
        return _expect(protocol.Asked, self._call(request)).number

    def destroy(self, name: str, *, lose_pages: bool = False, keep_settings: bool = False) -> None:
        """Remove a pool nobody serves."""
        self._change(protocol.Destroy(check_name(name), lose_pages, keep_settings))

    def rename(self, name: str, to: str) -> None:
        """Let what was set for a pool that is not there now hold for one of another name."""
        self._change(protocol.Rename(check_name(name), check_name(to)))

    def _change(self, request: protocol.Set | protocol.Freeze | protocol.Destroy | protocol.Rename) -> None:
        if note := _expect(protocol.Done, self._call(request)).note:
            self._tell(note)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def _expect(kind: type[_Answer], answer: protocol.Answer) -> _Answer:
    if isinstance(answer, kind):
        return answer
    if isinstance(answer, protocol.Failed):
        raise PoolError(answer.error)
    raise PoolError(f"tmemd gave an answer of the wrong kind: {type(answer).__name__}")


def _exchange(path: Path, request: protocol.Request) -> tuple[protocol.Answer, list[int]]:
    """One request, one answer, and the descriptors that came with it, which the caller closes."""
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            # Not settimeout(): that makes connect() fail at once where it should wait its turn.
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT)
            sock.connect(str(path))
            sock.sendall(protocol.encode(request))
            return protocol.decode_answer(_receive_line(sock, fds)), fds
    except PoolError:
        _close_all(fds)
        raise
    except OSError as error:
        _close_all(fds)
        reason = "no answer" if isinstance(error, BlockingIOError) else error.strerror or error
        raise UnreachableError(f"tmemd ({path}): {reason}", error) from None


def _receive_line(sock: socket.socket, fds: list[int]) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        data, ancillary, _, _ = sock.recvmsg(_CHUNK, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        fds += _descriptors(ancillary)
        line += data
        if not data:
            raise UnreachableError("tmemd hung up in the middle of its answer")
        if len(line) > protocol.MAX_ANSWER:
            raise PoolError("tmemd's answer has no end")
    return bytes(line)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()
