# SPDX-License-Identifier: BSD-3-Clause
"""The maintenance of a served device, beside its requests: when to demote, to compact, to age, and what was asked for.

One snapshot of the pool file is taken each tick, and the tick's decisions are made on it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from typing import Final

from tmemd.binding import _core
from tmemd.device.config import Debug
from tmemd.device.parts import Parts
from tmemd.device.watermark import MIN_AGE, FreeWatermark
from tmemd.sizes import format_size
from tmemd.store import requests
from tmemd.store.poolfile import GENERATION_SECONDS, Control, Counters, Snapshot
from tmemd.store.requests import ANY_PAGE, Choice, Queued, Request

TICK: Final = 0.1  # seconds between two looks at the control page
# After cold pages had to make room. With TICK as many reads are from RAM, but a working set that moves in takes 1.1 to
# 1.4 times as long (docs/decisions/0004-cold-pages-make-room.md).
TICK_UNDER_LOAD: Final = 0.01
TICK_AFTER_FAILURE: Final = 1.0
PUBLISH_EVERY: Final = 1.0  # seconds, while something changes
IDLE_AFTER: Final = 2.0  # seconds without a change: all there was to publish, to compact or to demote is done
# Seconds between two looks then. A hundred devices of one nbdkit take 1.8 to 2.4 % of a CPU, most of it to wake their
# threads; 3.6 % with TICK, 7.5 % with a whole tick each time.
TICK_WHILE_IDLE: Final = 0.2

DEMOTE_STEP: Final = 16 << 20  # bytes demoted in one go, so that other work gets its turn
EVICT_STEP: Final = 256 << 20  # likewise, of pages that need not be written
MOVES_STEP: Final = 20_000  # records compacted in one go, likewise

# Which part of the pool may be free slots before they are compacted although the device is busy.
WASTE: Final = 1 / 8
WASTE_WHILE_REFUSING: Final = 1 / 32


class Maintenance:
    """Looks after one device, in a thread of its own once `start` was called."""

    def __init__(self, core: _core.Device, parts: Parts, debug: Debug) -> None:
        """*debug* is told of each change of the target and of each round of demotion."""
        self._core = core
        self._parts = parts
        self._config = parts.config
        self._pool_fd = parts.pool_fd
        self._pool_path = parts.pool_path
        self._debug = debug
        self._snapshot = Snapshot()
        self._watermark = FreeWatermark(parts.config.watermark)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure = ""  # of the last tick
        self._target: int | None = None  # that was last set, in bytes
        self._activity = bytearray()  # what the snapshot said of it when it last changed
        self._changed = 0.0  # and when that was
        self._aged = time.monotonic()
        self._published: tuple[float, ...] | None = None  # what the counters said when ages were last published
        self._published_at = -PUBLISH_EVERY
        self._compacted: tuple[int, ...] | None = None  # and when compaction last found nothing to do
        self._marks: tuple[int, ...] | None = None
        self._refused = 0

    def start(self) -> None:
        """Begin, in a thread of this process (call it after any fork)."""
        self._thread = threading.Thread(target=self._run, name=f"tmem-{self._config.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, once what is going on is done."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        pause = TICK
        while not self._stop.wait(pause):
            try:
                pause = self.tick(time.monotonic())
                self._failure = ""
            except Exception as error:
                pause = TICK_AFTER_FAILURE
                if self._failure != repr(error):  # said once, however often it comes
                    print(f"tmem: {self._config.name}: maintenance failed: {error!r}", file=sys.stderr, flush=True)
                self._failure = repr(error)

    def tick(self, now: float) -> float:
        """Do what is due at *now*, in seconds of the monotonic clock: requests, the target, density, age.

        Returns in how many seconds the next tick is due; 0 while there is more to do.
        """
        self._parts.note_source()
        pool = self._take_snapshot()
        if self._is_idle(pool, now):
            return TICK_WHILE_IDLE
        self._age(now)
        if self._answer(requests.waiting(pool)):
            pool = self._take_snapshot()
        counters = pool.counters()
        target = self._current_target(counters, pool.control())
        self._publish_ages(counters, now)
        if self._config.file and counters.used_bytes > target:
            return 0 if self._demote(counters.used_bytes - target, bounded=True) else TICK
        if self._make_room(pool, counters, target):
            return TICK_UNDER_LOAD
        return 0 if self._compact_when_worth(counters) else TICK

    def _is_idle(self, pool: Snapshot, now: float) -> bool:
        """Whether nothing was asked for in a while, nor a target or the like set, and no generation has ended."""
        activity = pool.activity()
        if activity != self._activity:
            self._activity, self._changed = activity, now
        quiet = now - self._changed >= IDLE_AFTER and not self._failure
        return quiet and now - self._aged < GENERATION_SECONDS

    def _current_target(self, counters: Counters, control: Control) -> int:
        """Bytes. While it is being written, what was set before holds."""
        before = self._target
        if control.target is not None:
            self._target = control.target
        if self._target != before and self._target is not None:
            self._debug(f"target: {format_size(self._target)}, of which {format_size(counters.used_bytes)} are used")
        limit = counters.limit_bytes
        return limit if self._target is None else min(self._target, limit)

    def _age(self, now: float) -> None:
        if now - self._aged >= GENERATION_SECONDS:
            self._aged = now
            self._core.begin_generation()

    def _publish_ages(self, counters: Counters, now: float) -> None:
        """Publish what is stored by age, if it can have changed."""
        marks = (
            counters.puts, counters.invalidates, counters.gets, counters.file_reads, counters.demotions, self._aged,
        )  # fmt: skip
        if marks != self._published and now - self._published_at >= PUBLISH_EVERY:
            self._published, self._published_at = marks, now
            self._core.publish_ages()

    def _answer(self, waiting: list[Queued]) -> bool:
        """Do what was asked for, in that order. What has no answer when we are killed is done again."""
        for request in waiting:
            if self._stop.is_set():
                break
            requests.answer(self._pool_fd, request.number, self._carry_out(request))
        return bool(waiting)

    def _carry_out(self, request: Queued) -> int:
        """Returns its errno, 0 for success."""
        try:
            match request.op:
                case Request.DRAIN:
                    self._core.drain()
                case Request.DEMOTE:
                    self._give_back(request.argument, request.choice)
                case Request.FLUSH:
                    if not self._config.source:
                        return errno.EINVAL
                    self._core.demote(2 * self._config.size)  # of slots, a little more than the pages' bytes
                    self._core.compact(MOVES_STEP)
                case Request.COMPACT:
                    while self._compact() and not self._stop.is_set():
                        pass
                case Request.HANDOVER | Request.HANDBACK:
                    self._hand_over(request.op == Request.HANDOVER)
                case _:
                    return errno.EINVAL
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _hand_over(self, on: bool) -> None:
        """Be durable, and stay so for who serves the pool next; or be as configured again."""
        if on and self._config.overflow:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if not on:
            self._parts.note_handover(False)
        self._core.write_through(on or self._config.durable)
        if on:
            self._parts.note_handover(True)

    def _take_snapshot(self) -> Snapshot:
        return self._snapshot.take(self._pool_fd, self._pool_path)

    def _give_back(self, nbytes: int, choice: Choice) -> None:
        """Give *nbytes* of the pool's memory back, as far as there are records that the choice allows to demote.

        New puts may take it again at once, so what is demoted is bounded: twice as much as was asked for.
        """
        goal = max(self._take_snapshot().counters().used_bytes - nbytes, 0)
        left = 2 * nbytes
        while left > 0 and (over := self._take_snapshot().counters().used_bytes - goal) > 0:
            demoted = self._demote(over, choice)
            if not demoted:
                break
            left -= demoted

    def _make_room(self, pool: Snapshot, counters: Counters, target: int) -> bool:
        """Demote pages that are older than those that come in, as far as room for these is short."""
        back = sum(pool.ages().file_reads[: _core.PROMOTE_AGE]) + counters.prefetch_hits
        missing = self._watermark.missing(counters, back, target)
        if not missing or not self._config.backing or pool.control().frozen:
            return False
        if self._core.free_slot_bytes() > counters.used_bytes * WASTE_WHILE_REFUSING:
            missing -= self._core.compact(MOVES_STEP)
        return missing <= 0 or self._demote(missing, Choice(MIN_AGE), bounded=True) > 0

    def _demote(self, over: int, choice: Choice = ANY_PAGE, *, bounded: bool = False) -> int:
        """Demote one step towards giving *over* bytes back, and compact; returns the bytes of records demoted."""
        step = min(over, EVICT_STEP if self._config.source else DEMOTE_STEP)
        try:
            demoted = self._core.demote(step, min_age=choice.min_age, raw_only=choice.raw_only, bounded=bounded)
        except OSError:
            demoted = 0  # counted as an I/O error; tried again at the next tick
        punched = self._core.compact(MOVES_STEP)
        self._debug(
            f"demotion: {format_size(step)} asked, {format_size(demoted)} of records demoted,"
            f" {format_size(punched)} given back; pages of age {choice.min_age} and older"
        )
        return demoted

    def _compact_when_worth(self, now: Counters) -> bool:
        """Compact one step if it is worth it; True when it did something.

        It is when free slots take too large a part of the pool, above all while puts are refused, or when nothing else
        is to be done and something has changed since the last time.
        """
        marks = now.puts, now.invalidates, now.demotions
        idle, refusing = marks == self._marks, now.puts_refused != self._refused
        self._marks, self._refused = marks, now.puts_refused
        if marks == self._compacted:
            return False
        share = WASTE_WHILE_REFUSING if refusing else WASTE
        if not idle and self._core.free_slot_bytes() <= now.used_bytes * share:
            return False
        did = self._compact()
        if not did and idle:
            self._compacted = marks
        return did

    def _compact(self) -> bool:
        """One step; True when it did something."""
        moves = self._take_snapshot().counters().moves
        punched = self._core.compact(MOVES_STEP)
        return punched > 0 or self._take_snapshot().counters().moves > moves
