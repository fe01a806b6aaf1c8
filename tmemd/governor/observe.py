"""Pools as the governor sees them, tick after tick.

Counters are written by other users' processes: a number is taken for true only as far as it can be, and what a pool
takes of RAM is what the kernel says its file takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

from tmemd.settings import PoolSettings
from tmemd.sizes import format_size
from tmemd.store import poolfile
from tmemd.store.pool import Pool
from tmemd.store.poolfile import Ages, Control, Counters, Identity, PoolError
from tmemd.store.sample import PoolSample

_log: Final = logging.getLogger("tmemd")

# Beyond what it takes already, index and all, no device needs more to work: some records (core/device.c).
MINIMUM_MORE: Final = 1 << 20
LIMIT_MOST: Final = 1 << 62
# What a plugin takes before its pool is one: header and states, 8 MiB for a device of 16 TiB.
UNFINISHED_MOST: Final = 9 << 20
_NONE: Final = (0,) * poolfile.GENERATIONS
_NO_AGES: Final = Ages(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, 0)


class Seen(msgspec.Struct, gc=False):
    """A pool at one tick."""

    pool: Pool
    owner: int  # the user whose it is
    taken: int  # bytes of RAM, as the kernel counts them
    settings: PoolSettings
    control: Control | None = None  # None, with `sample`: nobody serves it, or it cannot be read
    identity: Identity | None = None
    sample: PoolSample | None = None
    before: PoolSample | None = None  # of the tick before


class Observer:
    """Remembers of each pool what the next look needs."""

    def __init__(self, settings: Callable[[str], PoolSettings]) -> None:
        self._settings = settings
        self._last: dict[str, Seen] = {}
        self._complained: set[str] = set()
        self._cut: set[str] = set()  # unfinished pools that were filled
        self._now = poolfile.Snapshot()

    def look(self, pools: Iterable[Pool]) -> dict[str, Seen]:
        """Each of them as it is now, by name."""
        self._last = {pool.name: self._look_at(pool) for pool in pools}
        self._complained &= self._last.keys()
        self._cut &= self._last.keys()
        return self._last

    def _look_at(self, pool: Pool) -> Seen:
        status = os.fstat(pool.fd)
        seen = Seen(pool, status.st_uid, status.st_blocks * 512, self._settings(pool.name))
        if seen.taken > UNFINISHED_MOST:
            self._cut_back(seen)
        if not pool.is_served():
            return seen
        last = self._last.get(pool.name)
        if last and last.pool is pool:
            seen.identity, seen.before = last.identity, last.sample
        try:
            self._read(seen)
        except PoolError as error:
            if pool.name not in self._complained:
                _log.warning("pool %s gets no target: %s", pool.name, error)
            self._complained.add(pool.name)
        else:
            self._complained.discard(pool.name)
        return seen

    def _cut_back(self, seen: Seen) -> None:
        """Give back what an unfinished pool takes beyond what plugins begin with: nobody was told that it is kept."""
        pool = seen.pool
        with suppress(PoolError, OSError):
            if poolfile.read_identity(pool.fd, pool.path) is None:
                os.ftruncate(pool.fd, poolfile.STATES_OFFSET)
                if pool.name not in self._cut:
                    _log.warning(
                        "pool %s is unfinished, and user %d has filled its file with %s: it is cut back",
                        pool.name, seen.owner, format_size(seen.taken),
                    )  # fmt: skip
                self._cut.add(pool.name)
                seen.taken = pool.taken()

    def _read(self, seen: Seen) -> None:
        """Raises PoolError."""
        # Written once, but for the paths, each time the pool is opened: it is served without a break since it was read.
        seen.identity = seen.identity or seen.pool.identity()
        if seen.identity is None:
            return
        now = self._now
        now.take(seen.pool.fd, seen.pool.path)
        counters = believed(now.counters(), seen.taken, seen.identity)
        # What policies go by only changes with a survey, and surveys are rarer than ticks.
        known = seen.before.ages if seen.before else None
        ages = now.ages(known)
        if ages is not known:
            ages = believed_ages(ages, seen.identity)
        seen.control = now.control()
        seen.sample = _sample(seen, counters, ages, seen.control)
        if seen.before and not _goes_on(seen.before.counters, counters):
            seen.before = None


def _sample(seen: Seen, counters: Counters, ages: Ages, control: Control) -> PoolSample:
    assert seen.identity
    settings, limit = seen.settings, counters.limit_bytes
    top = limit if settings.cap is None else min(limit, settings.cap)
    return PoolSample(
        name=seen.pool.name,
        weight=settings.weight,
        minimum_bytes=min(settings.minimum, top),
        cap_bytes=settings.cap,
        target_bytes=limit if control.target is None else min(control.target, limit),
        frozen=control.frozen,
        served=True,
        has_file=seen.identity.has_file,
        counters=counters,
        ages=ages,
    )


def believed(counters: Counters, taken: int, identity: Identity) -> Counters:
    """What can be true of the counters of a pool that takes *taken* bytes of RAM."""
    if (
        counters.used_bytes <= taken
        and counters.index_bytes <= counters.used_bytes
        and counters.minimum_bytes <= min(taken + MINIMUM_MORE, counters.limit_bytes)
        and counters.limit_bytes <= LIMIT_MOST
        and max(counters.pages_in_tmem, counters.pages_in_file) <= identity.pages
    ):
        return counters
    limit = min(counters.limit_bytes, LIMIT_MOST)
    used = min(counters.used_bytes, taken)
    return msgspec.structs.replace(
        counters,
        used_bytes=used,
        limit_bytes=limit,
        minimum_bytes=min(counters.minimum_bytes, taken + MINIMUM_MORE, limit),
        index_bytes=min(counters.index_bytes, used),
        pages_in_tmem=min(counters.pages_in_tmem, identity.pages),
        pages_in_file=min(counters.pages_in_file, identity.pages),
    )


def believed_ages(ages: Ages, identity: Identity) -> Ages:
    """The ages, or none where a survey found more than the device can have."""
    fits = sum(ages.stored_bytes) <= identity.data_bytes and sum(ages.filed_pages) <= identity.pages
    return ages if fits else _NO_AGES


def _goes_on(before: Counters, now: Counters) -> bool:
    """Whether the counters only grew, as those of one pool do."""
    return (
        now.puts >= before.puts
        and now.puts_refused >= before.puts_refused
        and now.gets >= before.gets
        and now.file_reads >= before.file_reads
        and now.demotion_writes >= before.demotion_writes
    )
