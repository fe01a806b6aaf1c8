# SPDX-License-Identifier: BSD-3-Clause
"""Answers Prometheus over HTTP, and survives everybody else who connects.

A connection carries one request and has a few seconds for it. There are only so many at once: who has said nothing for
longest goes before whoever comes is turned away. All of them send the same bytes, so that neither slow readers nor many
cost memory. Text is made in a thread of its own, from a snapshot, and
not so often that it could take more than a fifth of a core.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final, cast

from tmemd.daemon.metrics import CONTENT_TYPE, Snapshot, exposition
from tmemd.daemonconfig import Address
from tmemd.store.poolfile import PoolError

_log: Final = logging.getLogger("tmemd")
_CONNECTIONS: Final = 32
_BACKLOG: Final = 128
_TIMEOUT: Final = 10.0  # seconds for a whole exchange: what Prometheus waits by default
_MAX_REQUEST: Final = 8192
_REST: Final = 4  # an answer is used again for this many times as long as it took to make
_TEXT: Final = "text/plain; charset=utf-8"


def bind(address: Address) -> socket.socket:
    """A listening socket there. It may have to wait for a name server. Raises PoolError."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where, family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        raise PoolError(f"cannot serve metrics on {address}: {reason}") from None


def listen(address: Address) -> socket.socket:
    """The same for a MetricsServer, and a line in the log. Raises PoolError."""
    listener = bind(address)
    listener.setblocking(False)
    _log.info("metrics on http://%s/metrics", address)
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        _log.warning("metrics on %s: whoever reaches it can read the names and figures of all pools", address)
    return listener


class MetricsServer:
    """Serves what *snapshot* gives to whoever connects to *listener*."""

    def __init__(
        self, listener: socket.socket, snapshot: Callable[[], Awaitable[Snapshot]], *, timeout: float = _TIMEOUT
    ) -> None:
        self._listener = listener
        self._snapshot = snapshot
        self._timeout = timeout
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}  # the oldest first
        self._silent: dict[asyncio.Task[None], None] = {}  # of these, those whose request has not come yet
        self._making: asyncio.Task[bytes] | None = None
        self._stale_at = 0.0

    async def run(self) -> None:
        """Serve until cancelled; the listening socket is closed then."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # out of descriptors, or the peer is gone already
                    _log.warning("metrics: accept: %s", error.strerror)
                    await asyncio.sleep(0.1)
                    continue
                if len(self._tasks) >= _CONNECTIONS:
                    self._end(next(iter(self._silent or self._tasks)))
                task = loop.create_task(self._serve(sock))
                self._tasks[task] = sock
                self._silent[task] = None
                task.add_done_callback(self._end)
                await asyncio.sleep(0)  # let it ask, before others take its place
        finally:
            self._listener.close()
            ending = [*self._tasks, *([self._making] if self._making else [])]
            for task_ in ending:
                task_.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._silent.pop(task, None)
        if sock := self._tasks.pop(task, None):
            sock.close()

    async def _serve(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                head = await _receive_head(sock)
                self._silent.pop(cast("asyncio.Task[None]", asyncio.current_task()), None)
                for part in await self._answer(head):
                    await asyncio.get_running_loop().sock_sendall(sock, part)
        except OSError as error:  # TimeoutError is one
            _log.debug("metrics: %s", error)

    async def _answer(self, head: bytes) -> tuple[bytes, bytes]:
        method, path = _parsed(head)
        if not method:
            return _response("400 Bad Request", b"this is no HTTP request\n")
        if method not in {"GET", "HEAD"}:
            return _response("405 Method Not Allowed", b"GET is all there is\n", "Allow: GET, HEAD\r\n")
        if path != "/metrics":
            return _response("404 Not Found", b"metrics are at /metrics\n")
        try:
            body = await self._body()
        except Exception as error:
            _log.log(logging.WARNING, "metrics: %s", error, exc_info=not isinstance(error, PoolError | OSError))
            return _response("503 Service Unavailable", b"tmemd cannot look at its pools\n")
        header, body = _response("200 OK", body, content_type=CONTENT_TYPE)
        return header, b"" if method == "HEAD" else body

    async def _body(self) -> bytes:
        loop = asyncio.get_running_loop()
        if self._making is None or (self._making.done() and loop.time() >= self._stale_at):
            self._making = loop.create_task(self._make())
        # Who waits may give up; what is being made is for the others as well.
        return await asyncio.shield(self._making)

    async def _make(self) -> bytes:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await asyncio.to_thread(exposition, await self._snapshot())
        finally:
            now = loop.time()
            self._stale_at = now + _REST * (now - began)


async def _receive_head(sock: socket.socket) -> bytes:
    """What comes before the empty line, or what came until the peer stopped or it was too much."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) <= _MAX_REQUEST:
        data = await asyncio.get_running_loop().sock_recv(sock, 4096)
        if not data:
            break
        head += data
    return head


def _parsed(head: bytes) -> tuple[str, str]:
    """Method and path; two empty strings for what is no request."""
    line, end, _ = head.partition(b"\r\n")
    words = line.decode("latin-1").split(" ")
    if b"\r\n\r\n" not in head or not end or len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "", ""
    return words[0], words[1].partition("?")[0]


def _response(status: str, body: bytes, more: str = "", *, content_type: str = _TEXT) -> tuple[bytes, bytes]:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode("latin-1"), body
