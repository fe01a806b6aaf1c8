# SPDX-License-Identifier: BSD-3-Clause
"""What happens to pools, found by looking at them again and again. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from tmemd.protocol import Event, PoolStatus, Problem

# A target is news when it has moved by more than this part of what was last told, and by this many bytes.
_TARGET_SHARE: Final = 1 / 20
_TARGET_LEAST: Final = 1 << 20
REFUSED_EVERY: Final = 10.0  # seconds between two events of refused pages of a pool, at least


class Seen(msgspec.Struct, gc=False):
    """A pool at one look."""

    uid: int
    pid: int | None  # of the plugin that serves it; None: nobody does
    target: int  # bytes
    refused: int  # pages, since the pool was made
    nbd: int  # connections
    vhost: int

    @classmethod
    def of(cls, status: PoolStatus) -> Seen:
        """What its status says."""
        pid = status.counters.pid if status.served else None
        doors = status.connections
        refused = status.counters.puts_refused
        return cls(status.uid, pid, status.target_bytes, refused, doors["nbd"], doors["vhost"])


class _Told(msgspec.Struct, gc=False):
    """What was last told of a pool."""

    target: int
    refused: int
    refused_at: float


class Watcher:
    """Remembers the last look, so that the next can say what happened since."""

    def __init__(self) -> None:
        self._before: dict[str, Seen] | None = None
        self._told: dict[str, _Told] = {}
        self._problems: dict[str, str] = {}

    def look(self, pools: Mapping[str, Seen], problems: list[Problem], now: float) -> list[Event]:
        """What happened since the look before, in order of pools' names; at the first look nothing has.

        *now*: seconds of any clock that goes on, for what is not told each time.
        """
        is_first, before = self._before is None, self._before or {}
        self._before = dict(pools)
        self._told = {name: told for name, told in self._told.items() if name in pools}
        events = [*self._of_problems(problems)]
        for name in sorted(before.keys() | pools.keys()):
            events += self._of_pool(name, before.get(name), pools.get(name), now)
        return [] if is_first else events

    def _of_problems(self, problems: list[Problem]) -> Iterator[Event]:
        before, self._problems = self._problems, {problem.what: problem.words for problem in problems}
        for what, words in before.items():
            if what not in self._problems:
                yield Event(event="mended", what=what, words=words)
        for what, words in self._problems.items():
            if before.get(what) != words:
                yield Event(event="problem", what=what, words=words)

    def _of_pool(self, name: str, before: Seen | None, now: Seen | None, at: float) -> Iterator[Event]:
        if now is None:
            assert before
            yield Event(event="gone", pool=name, uid=before.uid)
            return
        if before is None:
            yield Event(event="appeared", pool=name, uid=now.uid)
        yield from _service(name, before, now)
        if now.pid is not None:
            told = self._told.setdefault(name, _Told(now.target, now.refused, at))
            yield from _target(name, told, now)
            yield from _refusals(name, told, now, at)


def _target(name: str, told: _Told, now: Seen) -> Iterator[Event]:
    if abs(now.target - told.target) > max(told.target * _TARGET_SHARE, _TARGET_LEAST):
        yield Event(event="target", pool=name, uid=now.uid, target_bytes=now.target, before_bytes=told.target)
        told.target = now.target


def _refusals(name: str, told: _Told, now: Seen, at: float) -> Iterator[Event]:
    if now.refused < told.refused:  # the pool was made anew
        told.refused = 0
    if now.refused > told.refused and at >= told.refused_at:
        yield Event(event="refused", pool=name, uid=now.uid, pages=now.refused - told.refused)
        told.refused, told.refused_at = now.refused, at + REFUSED_EVERY


def _service(name: str, before: Seen | None, now: Seen) -> Iterator[Event]:
    """Who serves it, and who came or went."""
    was = before.pid if before else None
    if was is not None and was != now.pid:
        yield Event(event="unserved", pool=name, uid=now.uid, pid=was)
    if now.pid is not None and was != now.pid:
        yield Event(event="served", pool=name, uid=now.uid, pid=now.pid)
    if (now.nbd, now.vhost) != ((before.nbd, before.vhost) if before else (0, 0)):
        connections = {"nbd": now.nbd, "vhost": now.vhost}
        yield Event(event="clients", pool=name, uid=now.uid, connections=connections)
