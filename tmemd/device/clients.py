# SPDX-License-Identifier: BSD-3-Clause
"""One client at a time: two guests that write to one device would each read what the other wrote."""

from __future__ import annotations

import threading
from typing import Final

from tmemd.system.peer import Peer

# Seconds for who leaves. One that is killed has left when the last of its requests is done: with 32 writes of 64 KiB on
# their way after 5 ms (median), and after 48 at most; a slow disk takes longer.
PATIENCE: Final = 3.0
EVERYBODY: Final = Peer("everybody", "several clients")  # those that may share are one


class InUseError(Exception):
    """Somebody else has the device; the message says who."""


class Clients:
    """Who has a device open: one client, with as many connections as it likes."""

    def __init__(self) -> None:
        self._left = threading.Condition()
        self._connections = 0
        self._holder = EVERYBODY

    def enter(self, peer: Peer, patience: float = PATIENCE) -> None:
        """Take a connection in, if need be once the last one of another client has left.

        Raises InUseError when that has not happened after *patience* seconds.
        """
        with self._left:
            if not self._left.wait_for(lambda: not self._connections or peer.is_same(self._holder), patience):
                raise InUseError(self._holder.name)
            self._holder = peer
            self._connections += 1

    def leave(self) -> None:
        """A connection has ended, and all its requests are done."""
        with self._left:
            self._connections -= 1
            self._left.notify_all()
