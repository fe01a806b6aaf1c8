# SPDX-License-Identifier: BSD-3-Clause
"""The control socket: connections, the lines that come in, and whose turn it is."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections import Counter, defaultdict
from collections.abc import Awaitable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tmemd import protocol
from tmemd.daemon.access import Access
from tmemd.daemon.administration import Administration
from tmemd.governor.governor import Governor
from tmemd.store.pool import open_pool_file
from tmemd.store.poolfile import PoolError
from tmemd.system.locks import open_lock_file
from tmemd.system.peer import Credentials

_log: Final = logging.getLogger("tmemd")
_T = TypeVar("_T")
# Enough for any use; a user who wants more gets an error instead of all of tmemd's descriptors.
_CONNECTIONS_PER_USER: Final = 64
_TOO_MANY: Final = protocol.Failed("too many connections of yours are open")
_BACKLOG: Final = 128


def listen(path: Path, group: int | None, resources: ExitStack) -> socket.socket:
    """The control socket, which only its owner and *group* may connect to. Raises PoolError, OSError.

    *resources* gets what undoes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock says whether another tmemd lives; the socket's file alone cannot.
    try:
        resources.callback(os.close, open_lock_file(path.with_name(path.name + ".lock")))
    except BlockingIOError:
        raise PoolError(f"another tmemd listens on {path}: it holds {path}.lock") from None
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise PoolError(f"{path} is there already, and is no socket: say --socket=PATH")
        path.unlink()
    listener = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    # Between bind and chmod nobody can connect: connect() is refused until listen().
    listener.bind(str(path))
    resources.callback(path.unlink, missing_ok=True)
    give_socket(path, group)
    listener.listen(_BACKLOG)
    return listener


def give_socket(path: Path, group: int | None) -> None:
    """Let *group* connect there, our own where there is none, and our own user. Raises OSError."""
    os.chown(path, -1, os.getegid() if group is None else group)
    path.chmod(0o660)


class Server:
    """Answers those who connect: one request and one answer for each connection."""

    def __init__(
        self, administration: Administration, governor: Governor, access: Access, timeout: float = protocol.TIMEOUT
    ) -> None:
        """*timeout*: seconds in which a request must arrive, and an answer be taken."""
        self._administration = administration
        self._governor = governor
        self.access = access  # may be replaced at any time
        self._timeout = timeout
        self._connections: Counter[int] = Counter()
        # A list of 256 pools takes 16 ms. With 60 connections that asked for it again and again, others waited for 0.6
        # to 1.1 s; 0.03 s where each user has one in a turn of the loop, and who connects need not wait for a turn.
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self, listener: socket.socket) -> None:
        """Serve everybody who connects, until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            for number in count():
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:  # out of descriptors, or the peer is gone already
                    _log.warning("accept: %s", error.strerror)
                    await asyncio.sleep(0.1)
                    continue
                connections.create_task(self._serve(sock))
                # With more of them waiting, accepting would go on and on before anybody else has a turn.
                if number % _BACKLOG == 0:
                    await asyncio.sleep(0)

    async def _serve(self, sock: socket.socket) -> None:
        peer = Credentials.of(sock)
        self._connections[peer.uid] += 1
        try:
            if self._connections[peer.uid] > _CONNECTIONS_PER_USER:
                await self._in_time(_send(sock, protocol.encode(_TOO_MANY)))
            else:
                await self._exchange(sock, peer)
        except TimeoutError:
            late = protocol.Failed(f"the request took longer than {self._timeout:g} s to arrive")
            with suppress(OSError):
                sock.send(protocol.encode(late))  # what fits without waiting
        except OSError as error:
            _log.debug("process %d: %s", peer.pid, error)
        except Exception:
            _log.exception("process %d, user %d", peer.pid, peer.uid)
        finally:
            self._connections[peer.uid] -= 1
            sock.close()

    async def _in_time(self, exchange: Awaitable[_T]) -> _T:
        async with asyncio.timeout(self._timeout):
            return await exchange

    async def _exchange(self, sock: socket.socket, peer: Credentials) -> None:
        try:
            line = await self._in_time(_receive_line(sock))
        except PoolError as error:
            data = protocol.encode(protocol.Failed(str(error)))
        else:
            data = b"" if line is None else await self._answer(sock, peer, line)
        if data:
            await self._in_time(_send(sock, data))

    async def _answer(self, sock: socket.socket, peer: Credentials, line: bytes) -> bytes:
        """What is left to be sent: nothing for an Attach, whose answer goes with its file."""
        try:
            request = protocol.decode_request(line)
            self.access.check(request, peer)
            if isinstance(request, protocol.Attach):
                async with self._administration.changing:
                    self._attach(sock, peer, request)
                return b""
            return protocol.encode(await self._perform(request, peer.uid))
        except PoolError as error:
            return protocol.encode(protocol.Failed(str(error)))
        except OSError as error:  # a full tmpfs, above all
            _log.warning("process %d, user %d: %s: %s", peer.pid, peer.uid, ascii(line), error.strerror)
            return protocol.encode(protocol.Failed(f"tmemd could not do it: {error.strerror}"))
        except Exception:
            _log.exception("process %d, user %d: %s", peer.pid, peer.uid, ascii(line))
            return protocol.encode(protocol.Failed("tmemd met an error: its log tells more"))

    async def _perform(self, request: protocol.Request, uid: int) -> protocol.Answer:
        problems = self._administration.problems
        if isinstance(request, protocol.Host):
            return msgspec.structs.replace(self._governor.status, problems=problems.all())
        if isinstance(request, protocol.Events):
            return await self._happened(request, uid)
        if not isinstance(request, protocol.List | protocol.Show):
            answer = await self._administration.perform(request)
            _log.info("user %d %s", uid, protocol.in_words(request))
            return answer
        async with self._turns[uid]:
            await asyncio.sleep(0)  # everybody else's
            answer = await self._administration.perform(request)
        assert isinstance(answer, protocol.Listed)
        visible = [self._governor.measured(status) for status in answer.pools if self.access.may_see(status.uid, uid)]
        if isinstance(request, protocol.Show) and not visible:
            raise PoolError(f"pool {request.name} belongs to another user")
        return protocol.Listed(visible, problems.all())

    async def _happened(self, request: protocol.Events, uid: int) -> protocol.Answer:
        journal = self._administration.journal
        number = journal.last if request.number is None else request.number
        await journal.wait(number, request.wait)
        events, missed = journal.since(number)
        visible = [event for event in events if self.access.may_see(event.uid, uid)]
        return protocol.Happened(visible, journal.last, missed)

    def _attach(self, sock: socket.socket, peer: Credentials, request: protocol.Attach) -> None:
        bounded = not self.access.is_admin(peer.uid)
        governor = self._governor
        with self._administration.attach(
            request, peer.uid, peer.gid, bounded=bounded, allow=governor.first_target, admit=governor.admit
        ) as found:
            # The plugin gets an open file description of its own: locks belong to it, and ours must end with us.
            fd = open_pool_file(found.path)
            try:
                socket.send_fds(sock, [protocol.encode(protocol.Attached(str(found.path)))], [fd])
            finally:
                os.close(fd)
        _log.info("user %d, process %d, attached pool %s", peer.uid, peer.pid, request.name)


async def _receive_line(sock: socket.socket) -> bytes | None:
    """The one line a client sends; None when it hung up before its end. Raises PoolError when it is no such line."""
    loop = asyncio.get_running_loop()
    line = b""
    while b"\n" not in line:
        if len(line) > protocol.MAX_REQUEST:
            raise PoolError(f"bad request: longer than {protocol.MAX_REQUEST} bytes")
        data = await loop.sock_recv(sock, protocol.MAX_REQUEST)
        if not data:
            return None
        line += data
    if not line.endswith(b"\n") or line.count(b"\n") > 1:
        raise PoolError("bad request: a connection carries one request, on one line")
    return line


async def _send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)
