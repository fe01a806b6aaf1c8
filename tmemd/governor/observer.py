# SPDX-License-Identifier: BSD-3-Clause
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
from tmemd.store.sample import NO_AGES, PoolSample

_log: Final = logging.getLogger("tmemd")

# Beyond what it takes already, index and all, no device needs more to work: some records (core/device.c).
MINIMUM_MORE: Final = 1 << 20
LIMIT_MOST: Final = 1 << 62
# What a plugin takes before its pool is one: header and states, 8 MiB for a device of 16 TiB.
UNFINISHED_MOST: Final = 9 << 20


class Observation(msgspec.Struct, gc=False):
    """What a pool looks like at one tick."""

    pool: Pool
    owner: int  # the user whose it is
    taken: int  # bytes of RAM, as the kernel counts them
    settings: PoolSettings
    control: Control | None = None  # None, with `sample`: nobody serves it, or it cannot be read
    identity: Identity | None = None
    sample: PoolSample | None = None
    before: PoolSample | None = None  # of the tick before
    connections: tuple[int, int] = (0, 0)  # of clients: by NBD, by virtio

    @property
    def committed(self) -> int:
        """Bytes of the budget that it has: its target, or what it takes where nobody heeds one."""
        return self.sample.target_bytes if self.sample else self.taken


class Observer:
    """Remembers of each pool what the next look needs."""

    def __init__(self, settings: Callable[[str], PoolSettings]) -> None:
        self._settings = settings
        self._last: dict[str, Observation] = {}
        self._complained: set[str] = set()
        self._cut: set[str] = set()  # unfinished pools that were filled
        self._now = poolfile.Snapshot()

    def look(self, pools: Iterable[Pool]) -> dict[str, Observation]:
        """Each of them as it is now, by name."""
        self._last = {pool.name: self._look_at(pool) for pool in pools}
        self._complained &= self._last.keys()
        self._cut &= self._last.keys()
        return self._last

    def _look_at(self, pool: Pool) -> Observation:
        status = os.fstat(pool.fd)
        each = Observation(pool, status.st_uid, status.st_blocks * 512, self._settings(pool.name))
        if each.taken > UNFINISHED_MOST:
            self._cut_back(each)
        if not pool.is_served():
            return each
        last = self._last.get(pool.name)
        if last and last.pool is pool:
            each.identity, each.before = last.identity, last.sample
        try:
            self._read(each)
        except PoolError as error:
            if pool.name not in self._complained:
                _log.warning("pool %s gets no target: %s", pool.name, error)
            self._complained.add(pool.name)
        else:
            self._complained.discard(pool.name)
        return each

    def _cut_back(self, each: Observation) -> None:
        """Give back what an unfinished pool takes beyond what plugins begin with: nobody was told that it is kept."""
        pool = each.pool
        with suppress(PoolError, OSError):
            if poolfile.read_identity(pool.fd, pool.path) is None:
                os.ftruncate(pool.fd, poolfile.STATES_OFFSET)
                if pool.name not in self._cut:
                    _log.warning(
                        "pool %s is unfinished, and user %d has filled its file with %s: it is cut back",
                        pool.name, each.owner, format_size(each.taken),
                    )  # fmt: skip
                self._cut.add(pool.name)
                each.taken = pool.taken()

    def _read(self, each: Observation) -> None:
        """Raises PoolError."""
        # Written when the pool is opened; it has been served without a break since it was read.
        each.identity = each.identity or each.pool.identity()
        if each.identity is None:
            return
        now = self._now
        now.take(each.pool.fd, each.pool.path)
        counters = clamped(now.counters(), each.taken, each.identity)
        # Ages are published less often than the governor ticks.
        known = each.before.ages if each.before else None
        ages = now.ages(known)
        if ages is not known:
            ages = checked_ages(ages, each.identity)
        each.control, each.connections = now.control(), now.connections()
        each.sample = _sample(each, counters, ages, each.control, now.file_read_ns())
        if each.before and not _goes_on(each.before.counters, counters):
            each.before = None


def _sample(each: Observation, counters: Counters, ages: Ages, control: Control, file_read_ns: int) -> PoolSample:
    assert each.identity
    settings, limit = each.settings, counters.limit_bytes
    top = limit if settings.cap is None else min(limit, settings.cap)
    return PoolSample(
        name=each.pool.name,
        weight=settings.weight,
        minimum_bytes=min(settings.minimum, top),
        cap_bytes=settings.cap,
        target_bytes=limit if control.target is None else min(control.target, limit),
        frozen=control.frozen,
        served=True,
        has_file=each.identity.has_file,
        is_ephemeral=each.identity.is_ephemeral,
        file_read_ns=file_read_ns,
        counters=counters,
        ages=ages,
    )


def clamped(counters: Counters, taken: int, identity: Identity) -> Counters:
    """The counters, reduced to what can be true of a pool that takes *taken* bytes of RAM."""
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


def checked_ages(ages: Ages, identity: Identity) -> Ages:
    """The ages, or none where they are of more than the device can have."""
    fits = sum(ages.stored_bytes) <= identity.data_bytes and sum(ages.in_file_pages) <= identity.pages
    return ages if fits else NO_AGES


def _goes_on(before: Counters, now: Counters) -> bool:
    """Whether the counters only grew, as those of one pool do."""
    return (
        now.puts >= before.puts
        and now.puts_refused >= before.puts_refused
        and now.gets >= before.gets
        and now.file_reads >= before.file_reads
        and now.demotion_writes >= before.demotion_writes
    )
