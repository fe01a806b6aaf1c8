# SPDX-License-Identifier: BSD-3-Clause
"""Look at all pools again and again, through a tmemd that may be away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tmemd.cli.activity import Activity, activity
from tmemd.client import Client, UnreachableError
from tmemd.protocol import HostStatus, PoolStatus
from tmemd.store.poolfile import PoolError


@dataclass(frozen=True)
class Frame:
    """What one look gave."""

    time: float  # seconds since the epoch
    seconds: float  # since the look before
    host: HostStatus | None  # None without a tmemd, or where it does not tell
    pools: list[Activity]
    notes: list[str]  # what is wrong with tmemd and pools, a line each
    error: str | None = None  # why there was no answer; the rest is from the last one then

    def builtins(self) -> dict[str, Any]:
        """One JSON object; without an answer there is no host in it, and there are no pools."""
        answered = self.error is None
        return {
            "time": self.time,
            "seconds": self.seconds,
            "error": self.error,
            "host": self.host.flat() if self.host and answered else None,
            "pools": [pool.builtins() for pool in self.pools] if answered else [],
        }


class Watch:
    """Remembers the last look, so that the next can say what happened since."""

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._before: dict[str, PoolStatus] = {}
        self._at = clock()
        self._last: Frame | None = None

    def look(self) -> Frame:
        """Ask once. Raises PoolError when the very first question is not answered; later ones make a frame of it."""
        try:
            listed, host = self._client.listed(long=True), self._host()
        except PoolError as error:
            if self._last is None:
                raise
            self._last = replace(self._last, time=time.time(), error=str(error))
            return self._last
        now = self._clock()
        seconds = now - self._at
        statuses = listed.pools
        pools = [activity(self._before.get(status.name), status, seconds) for status in statuses]
        notes = [problem.words for problem in listed.problems]
        notes += [f"{status.name}: {status.error}" for status in statuses if status.error]
        self._before, self._at = {status.name: status for status in statuses}, now
        self._last = Frame(time.time(), seconds, host, pools, notes)
        return self._last

    def _host(self) -> HostStatus | None:
        try:
            return self._client.host()
        except UnreachableError:
            raise
        except PoolError:  # there is no tmemd, or it tells only others
            return None
