# SPDX-License-Identifier: BSD-3-Clause
"""What happened of late, for those who wait to hear of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import msgspec

from tmemd.protocol import Event

_KEPT: Final = 4096  # events


class Journal:
    """The last events, each with a number. Numbers go on where those of an earlier tmemd ended, and beyond."""

    def __init__(self) -> None:
        self.last = time.time_ns() // 1000
        self._forgotten = self.last  # up to here nothing is known
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()

    def add(self, events: Iterable[Event]) -> None:
        """Note that they happened now."""
        for event in events:
            self.last += 1
            self._events.append(msgspec.structs.replace(event, number=self.last, time=round(time.time(), 3)))
            if len(self._events) > _KEPT:
                self._forgotten = self._events.popleft().number
            self._news.set()

    def since(self, number: int) -> tuple[list[Event], bool]:
        """The events after that one, and whether there may have been others that are forgotten."""
        return [event for event in self._events if event.number > number], number < self._forgotten

    async def wait(self, number: int, seconds: float) -> None:
        """Until something happens after that event, for so many seconds at most."""
        if self.last > number:
            return
        self._news.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
