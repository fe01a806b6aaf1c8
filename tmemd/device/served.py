"""A device that is being served: its page path, and the upkeep that goes on beside it.

What decides is here: when to demote, to compact, to age, and what a request means.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tmemd.binding import _core
from tmemd.device.backing import BackingError
from tmemd.device.clients import Clients
from tmemd.device.config import ConfigError, DeviceConfig
from tmemd.device.headroom import Headroom
from tmemd.device.opening import Opening, open_parts
from tmemd.store import poolfile, requests
from tmemd.store.mapfile import MapError
from tmemd.store.poolfile import GENERATION_SECONDS, Counters, PoolError
from tmemd.store.requests import Choice, Queued, Request

__all__ = [
    "ConfigError",
    "DeviceConfig",
    "DeviceErrors",
    "ServedDevice",
    "check_together",
    "drain_offline",
    "open_device",
    "open_devices",
]

TICK: Final = 0.1  # seconds between two looks at the control page
# After cold pages had to make room. With TICK as many reads are from RAM, but a working set that moves in takes 1.1 to
# 1.4 times as long (docs/decisions/0004-cold-pages-make-room.md).
TICK_UNDER_LOAD: Final = 0.01
TICK_AFTER_FAILURE: Final = 1.0
# Generations: pages this old were not used for at least one whole one, and make room for others. With 1 uniform use of
# everything writes 0.65 pages to the disk for each page written, with 2 0.53, without any room made 0.49.
OLDER: Final = 2
SURVEY_EVERY: Final = 1.0  # seconds, while something changes
REST_AFTER: Final = 2.0  # seconds in which nothing changed: what there was to survey, to compact or to demote is done
# Seconds between two looks then. A hundred devices of one nbdkit take 1.8 to 2.4 % of a CPU, most of it to wake their
# threads; 3.6 % with TICK, 7.5 % with a whole tick each time.
TICK_AT_REST: Final = 0.2

DEMOTE_STEP: Final = 16 << 20  # bytes demoted in one go, so that other work gets its turn
MOVES_STEP: Final = 20_000  # records compacted in one go, likewise

# Which part of the pool may be free slots before they are compacted although the device is busy.
WASTE: Final = 1 / 8
WASTE_WHILE_REFUSING: Final = 1 / 32

DeviceErrors: Final = (BackingError, MapError, PoolError, OSError)


class ServedDevice:
    """An open device: its page path in `core`, and the thread that looks after it once `start` was called."""

    def __init__(self, opening: Opening, core: _core.Device, owned: ExitStack) -> None:
        self.config = opening.config
        self.pool_path = opening.pool_path
        self.core = core
        self.clients = Clients()
        self._pool_fd = opening.pool_fd
        self._owned = owned
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._settled: tuple[int, ...] | None = None  # the counters' marks when settling last found nothing to do
        self._seen: tuple[int, ...] | None = None
        self._refused = 0
        self._headroom = Headroom(self.config.headroom)
        self._aged = time.monotonic()
        self._surveyed: tuple[float, ...] | None = None  # what the counters said at the last survey
        self._last_survey = -SURVEY_EVERY
        self._words = b""  # counters and control, when they last changed
        self._changed = 0.0  # and when that was
        self._failure = ""  # of the last round of upkeep

    def start(self) -> None:
        """Begin the upkeep, in a thread of this process (call it after any fork)."""
        self.core.serve()
        self._thread = threading.Thread(target=self._run, name=f"tmem-{self.config.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the upkeep, unmap, unlock and close everything. The pool stays, for whoever attaches next."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.core.close()
        self._owned.close()

    def counters(self) -> Counters:
        """A snapshot of the device's counters."""
        return poolfile.read_counters(self._pool_fd, self.pool_path)

    def _run(self) -> None:
        pause = TICK
        while not self._stop.wait(pause):
            try:
                pause = TICK_AT_REST if self.is_resting(time.monotonic()) else self.tick()
                self._failure = ""
            except Exception as error:
                pause = TICK_AFTER_FAILURE
                self._report(repr(error))

    def _report(self, failure: str) -> None:
        """Say it once, however often it comes."""
        if failure != self._failure:
            print(f"tmem: {self.config.name}: upkeep failed: {failure}", file=sys.stderr, flush=True)
        self._failure = failure

    def is_resting(self, now: float) -> bool:
        """Whether a tick at *now*, in seconds of the monotonic clock, would find nothing to do.

        Nobody has asked for anything for a while, nor set a target or the like, and no generation has ended.
        """
        words = requests.read_counters_and_control(self._pool_fd)
        if words != self._words:
            self._words, self._changed = words, now
        quiet = now - self._changed >= REST_AFTER and not self._failure
        return quiet and now - self._aged < GENERATION_SECONDS

    def tick(self) -> float:
        """One round of upkeep: what was asked for, the target, density, age.

        Returns in how many seconds the next one is due; 0 while there is more to do.
        """
        self._age()
        self._survey()
        self._answer()
        over = self.core.over_target()
        if over:
            return 0 if self._shrink(over, bounded=True) else TICK
        if self._make_room():
            return TICK_UNDER_LOAD
        return 0 if self._settle_when_worth() else TICK

    def _age(self) -> None:
        if time.monotonic() - self._aged >= GENERATION_SECONDS:
            self._aged = time.monotonic()
            self.core.age()

    def _survey(self) -> None:
        """Publish what is stored by age, if it can have changed."""
        now = self.counters()
        marks = now.puts, now.invalidates, now.gets, now.file_reads, now.demotions, self._aged
        if marks != self._surveyed and time.monotonic() - self._last_survey >= SURVEY_EVERY:
            self._surveyed, self._last_survey = marks, time.monotonic()
            self.core.publish_ages()

    def _make_room(self) -> bool:
        """Demote pages that are older than those that come in, as far as room for these is short."""
        counters, room = self.counters(), self.core.room()
        missing = self._headroom.missing(counters, self._back(), room, counters.used_bytes + room)
        if not missing or not self.config.backing or poolfile.read_control(self._pool_fd).frozen:
            return False
        if self.core.wasted() > counters.used_bytes * WASTE_WHILE_REFUSING:
            missing -= self.core.compact(MOVES_STEP)
        return missing <= 0 or self._shrink(missing, min_age=OLDER, bounded=True) > 0

    def _back(self) -> int:
        """How many pages came back from the file so soon that they are put again where there is room."""
        return sum(poolfile.Snapshot().take(self._pool_fd, self.pool_path).ages().file_reads[: _core.PROMOTE_AGE])

    def _answer(self) -> None:
        """Do what was asked for, in the order in which it was. What has no answer when we are killed is done again."""
        for request in requests.waiting(self._pool_fd):
            if self._stop.is_set():
                return
            requests.answer(self._pool_fd, request.number, self._carry_out(request))

    def _carry_out(self, request: Queued) -> int:
        """Returns its errno, 0 for success."""
        try:
            match request.op:
                case Request.DRAIN:
                    self.core.drain()
                case Request.DEMOTE:
                    self._demote(request.argument, request.choice)
                case Request.COMPACT:
                    self._settle_fully()
                case _:
                    return errno.EINVAL
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _demote(self, nbytes: int, choice: Choice) -> None:
        """Give *nbytes* of the pool's memory back, as far as there are records that the choice allows to demote.

        New puts may take it again at once, so what is demoted is bounded: twice as much as was asked for.
        """
        goal = max(self.counters().used_bytes - nbytes, 0)
        left = 2 * nbytes
        while left > 0 and (over := self.counters().used_bytes - goal) > 0:
            demoted = self._shrink(over, min_age=choice.min_age, raw_only=choice.raw_only)
            if not demoted:
                break
            left -= demoted

    def _shrink(self, over: int, *, min_age: int = 0, raw_only: bool = False, bounded: bool = False) -> int:
        """Demote one step towards giving *over* bytes back, and compact; returns the bytes of records demoted."""
        try:
            demoted = self.core.demote(min(over, DEMOTE_STEP), min_age=min_age, raw_only=raw_only, bounded=bounded)
        except OSError:
            demoted = 0  # counted as an I/O error; tried again at the next tick
        self.core.compact(MOVES_STEP)
        return demoted

    def _settle_when_worth(self) -> bool:
        """Compact one step if it is worth it; True when it did something.

        It is when free slots take too large a part of the pool, above all while puts are refused, or when nothing else
        is to be done and something has changed since the last time.
        """
        now = self.counters()
        marks = now.puts, now.invalidates, now.demotions
        idle, refusing = marks == self._seen, now.puts_refused != self._refused
        self._seen, self._refused = marks, now.puts_refused
        if marks == self._settled:
            return False
        share = WASTE_WHILE_REFUSING if refusing else WASTE
        if not idle and self.core.wasted() <= now.used_bytes * share:
            return False
        did = self._settle_step()
        if not did and idle:
            self._settled = marks
        return did

    def _settle_step(self) -> bool:
        moves = self.counters().moves
        given = self.core.compact(MOVES_STEP)
        return given > 0 or self.counters().moves > moves

    def _settle_fully(self) -> None:
        while self._settle_step() and not self._stop.is_set():
            pass


def check_together(configs: Sequence[DeviceConfig]) -> None:
    """Check devices that are to be opened together. Raises ConfigError."""
    owners: dict[Path, str] = {}
    for config in configs:
        config.check()
        for path in (config.backing, config.map):
            if path and owners.setdefault(path, config.name) != config.name:
                raise ConfigError(f"{config.name}: {path} is already device {owners[path]}'s")


def open_devices(configs: Sequence[DeviceConfig], *, root: Path = Path("/")) -> list[ServedDevice]:
    """Open what *configs* name, creating what is not there yet; nothing on disk changes when one of them fails.

    *root* stands in for / where /proc and /sys are read. Raises ConfigError, or one of DeviceErrors.
    """
    check_together(configs)
    with ExitStack() as undo:
        served = []
        for config in configs:
            device = ServedDevice(*_open(config, root, undo))
            undo.callback(device.close)
            served.append(device)
        undo.pop_all()
    return served


def _open(config: DeviceConfig, root: Path, undo: ExitStack) -> tuple[Opening, _core.Device, ExitStack]:
    try:
        return open_parts(config, root, undo)
    except OSError as error:
        raise PoolError(f"{error.filename or config.name}: {error.strerror or error}") from None


def open_device(config: DeviceConfig, *, root: Path = Path("/")) -> ServedDevice:
    """Open one device, as `open_devices` does."""
    return open_devices([config], root=root)[0]


def drain_offline(pool_path: Path) -> None:
    """Drain a pool that no plugin serves into the backing file it was last opened with. Raises one of DeviceErrors."""
    with open(pool_path, "rb") as pool:
        identity = poolfile.read_identity(pool.fileno(), pool_path)
        if identity is None:
            return
        limit = poolfile.read_counters(pool.fileno(), pool_path).limit_bytes
    if not identity.has_file:
        raise PoolError(f"{pool_path}: the pool has no backing file to drain to")
    config = DeviceConfig(
        identity.name, identity.size, Path(identity.backing), limit, pool_path.parent, map=Path(identity.map)
    )
    if not config.backing or not config.backing.exists():
        raise PoolError(f"{pool_path}: its backing file {identity.backing} is not there")
    served = open_device(config)
    try:
        served.core.drain()
    finally:
        served.close()
