# SPDX-License-Identifier: BSD-3-Clause
"""What tmemd does to pools for those who ask, and what it remembers of them.

Settings are on disk before they are in a pool's control page, and there before anybody is told that they hold: whenever
tmemd dies, what it confirmed survives. A pool that it adopts gets what is on disk. Where the disk is full, or the file
damaged, settings hold all the same, for memory may have to be taken back now; whoever sets them gets a note.

The disk may be slow: it is written in a thread, and meanwhile what was set before holds. Changes wait for each other.

What was set for a pool is kept with its owner: it is not for another user who has a pool of that name later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import UNSET

from tmemd import operations, protocol
from tmemd.daemon.journal import Journal
from tmemd.daemon.problems import Problems
from tmemd.daemonconfig import DaemonConfig, PoolConfig
from tmemd.protocol import PoolStatus
from tmemd.settings import Overrides, PoolSettings, SettingsStore, changed, merge
from tmemd.sizes import format_size
from tmemd.store import poolfile
from tmemd.store.directory import Pools
from tmemd.store.pool import Pool
from tmemd.store.poolfile import PoolError

_log: Final = logging.getLogger("tmemd")

_Change: TypeAlias = protocol.Set | protocol.Freeze | protocol.Destroy | protocol.Rename
_NO_CONFIG: Final = PoolConfig()
_NEARLY: Final = 0.99  # the kernel's 50 % of RAM are a few pages less than ours


class Administration:
    """The pools of one tmemd with their settings.

    *total* is how many bytes of RAM the host has.
    """

    def __init__(self, pools: Pools, store: SettingsStore, config: DaemonConfig, total: int) -> None:
        self.pools = pools
        self._store = store
        self._total = total
        self._merged: dict[str, PoolSettings] = {}  # the governor asks for every pool's twice a second
        self._owners: dict[str, int] = {}  # whose pools they were that settings were merged for
        self._overcommitted: tuple[int, int] | None = None  # bytes there are, and bytes promised, where these are more
        self.problems = Problems()
        self.journal = Journal()
        self.changing = asyncio.Lock()  # held by whoever changes settings or makes pools, until it is done
        self.configure(config)

    def settings(self, name: str) -> PoolSettings:
        """What holds for a pool, whether or not it is there now."""
        found = self._merged.get(name)
        if found is None:
            found = self._merged[name] = merge(self._kept(name), self.config.pools.get(name, _NO_CONFIG))
        return found

    def granted(self, name: str) -> PoolSettings:
        """The same, with no more promised than there is: where it would be more, each has the same part of its own."""
        settings = self.settings(name)
        if self._overcommitted is None:
            return settings
        there, promised = self._overcommitted
        target = None if settings.target is None else settings.target * there // promised
        return msgspec.structs.replace(settings, minimum=settings.minimum * there // promised, target=target)

    def _kept(self, name: str) -> Overrides:
        """What was set for the pool, if it is still the same user's, or nobody's now."""
        return Overrides() if self._is_of_another(name) else self._store.of(name)

    def _is_of_another(self, name: str) -> bool:
        """Whether what is kept for the pool was set while it was another user's."""
        kept = self._store.of(name).owner
        return kept is not UNSET and self.pools.owner(name) not in (None, kept)

    def _changed(self, name: str, *, forget: Iterable[str] = (), **fields: Any) -> Overrides:
        owner = self.pools.owner(name)
        return changed(self._kept(name), forget=forget, owner=UNSET if owner is None else owner, **fields)

    async def _keep(self, changes: dict[str, Overrides]) -> None:
        """It is on disk when this returns, or there is a problem, and holds. Pools may have come and gone meanwhile."""
        await asyncio.to_thread(self._store.change, changes)
        self._stored()

    def _stored(self) -> None:
        self._merged.clear()
        self.problems.note("settings", self._store.problem)
        self._review()

    def _review(self) -> None:
        """Hold all that is promised against what there is, of pools that are not there now as well: they come back."""
        try:
            promised, there = sum(self.settings(name).promised for name in self._names()), self._most()
        except PoolError:
            return  # the directory is away; what held goes on
        self._overcommitted = (there, promised) if promised > there else None
        self.problems.note("promises", self._overcommitted and (
            f"minimums and fixed targets are {format_size(promised)} in all, and the host gives at most"
            f" {format_size(there)} (budget.maximum, or the size of the tmpfs): each has {there / promised:.0%} of its"
            " own; set smaller ones, or destroy pools that do not come back"
        ))  # fmt: skip

    def _names(self) -> set[str]:
        """The pools that are there, or may come and have something set for them."""
        return {*self.pools.names(), *self._store.names(), *self.config.pools}

    def _most(self) -> int:
        return min(self.config.budget.maximum.of(self._total), self.pools.capacity())

    def name_owners(self) -> None:
        """Note whose pools those are that settings were kept for before owners were. Waits for the disk."""
        names = [name for name in self._store.names() if self._store.of(name).owner is UNSET]
        self._store.change({name: self._changed(name) for name in names})
        self._stored()

    async def retry(self) -> None:
        """Write what could not be written, and read what could not be read."""
        if self._store.problem:
            await self._keep({})

    def configure(self, config: DaemonConfig) -> None:
        """Go by another configuration from now on; what it says of pools is in their control pages after `adopt`."""
        self.config = config
        self._merged.clear()
        self._report_small_tmpfs()

    def _report_small_tmpfs(self) -> None:
        """Log it where pools get less than the configuration allows, for their tmpfs holds no more."""
        maximum = self.config.budget.maximum.of(self._total)
        with suppress(PoolError):
            if (capacity := self.pools.capacity()) < maximum * _NEARLY:
                _log.info(
                    "pools get at most %s, which is what %s holds (tmpfs.size), and not budget.maximum, %s",
                    format_size(capacity), self.pools.directory, format_size(maximum),
                )  # fmt: skip

    def adopt(self) -> set[str]:
        """Look after all pools there are now, and make their settings hold.

        Returns the names of those that cannot be used. Raises PoolError.
        """
        self._review()
        return self.pools.adopt_all(self._apply)

    @contextmanager
    def attach(
        self,
        request: protocol.Attach,
        uid: int,
        gid: int,
        *,
        bounded: bool,
        allow: Callable[[protocol.Attach, int], int] = lambda _, wanted: wanted,
        admit: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Pool]:
        """The pool that a plugin of this user wants, made if need be, with its settings and a first target.

        *bounded*: the user may not have more than `pools_per_user`, nor another pool that *admit* refuses him. *allow*
        says how many of so many bytes a pool may take. Raises PoolError.
        """
        if bounded:
            self._check_quota(request.name, uid, admit)
        self.pools.create(request.name, uid, gid)
        self._merged.pop(request.name, None)  # of a pool that was another user's, perhaps
        with self.pools.pool(request.name, control=True) as found:
            identity = found.identity()
            # A source may have changed its size, and is another then.
            if identity and not identity.is_ephemeral and identity.size != request.size:
                raise PoolError(
                    f"pool {request.name} is of a device of {identity.size} bytes, not {request.size}:"
                    f" serve it with size={identity.size}, or destroy it"
                )
            wanted = self._first_target(found, request)
            free = self.settings(found.name).target is None
            poolfile.write_target(found.fd, allow(request, wanted) if free else wanted)
            self._apply(found)
            yield found

    def _check_quota(self, name: str, uid: int, admit: Callable[[int], None]) -> None:
        owners = self.pools.owners()
        mine = sum(owner == uid for owner in owners.values())
        if name not in owners and mine >= self.config.pools_per_user:
            raise PoolError(f"user {uid} has {mine} pools, and may not have more (pools_per_user)")
        if name not in owners:
            admit(uid)

    def _first_target(self, found: Pool, request: protocol.Attach) -> int:
        """A target once found stays; one that stood at the device's limit follows that limit."""
        settings = self.granted(found.name)
        if settings.pinned is not None:
            return settings.pinned
        target = poolfile.read_control(found.fd).target
        if found.identity() is None or (
            target is not None and target >= poolfile.read_counters(found.fd, found.path).limit_bytes
        ):
            target = None
        first = (request.limit or request.size) if target is None else target
        return first if settings.cap is None else min(first, settings.cap)

    async def perform(self, request: protocol.Request) -> protocol.Answer:
        """Carry out anything but an Attach. Raises PoolError."""
        if isinstance(request, _Change):
            async with self.changing:
                await self._change(request)
                return protocol.Done(self._store.problem or self._note(request))
        answer = operations.perform(self.pools, request)
        if isinstance(answer, protocol.Listed):
            return protocol.Listed([self._with_settings(status) for status in answer.pools])
        return answer

    def _note(self, request: _Change) -> str | None:
        if isinstance(request, protocol.Set) and self.pools.owner(request.name) is None:
            return f"there is no pool {request.name} now: what was set holds when it comes"
        return None

    async def _change(self, request: _Change) -> None:
        if isinstance(request, protocol.Set):
            await self._set(request)
        elif isinstance(request, protocol.Destroy):
            await self._destroy(request)
        elif isinstance(request, protocol.Rename):
            await self._rename(request.name, request.to)
        elif request.name is None:
            await self._freeze_all(request.frozen)
        else:
            await self._freeze(request.name, request.frozen)

    def status(self, name: str) -> PoolStatus | None:
        """All that is known of one pool, latencies and ages too; None where there is none."""
        status = operations.status(self.pools, name, long=True)
        return status and self._with_settings(status)

    def _with_settings(self, status: PoolStatus) -> PoolStatus:
        # A pool may have been frozen where there was no tmemd to remember it.
        settings = msgspec.structs.replace(self.settings(status.name), frozen=status.frozen)
        return msgspec.structs.replace(status, settings=settings)

    async def _set(self, request: protocol.Set) -> None:
        if twice := [field for field in sorted(request.forget) if getattr(request, field) is not UNSET]:
            raise PoolError(f"{twice[0]} cannot be set and forgotten at once")
        overrides = self._changed(
            request.name, forget=request.forget,
            target=request.target, weight=request.weight, cap=request.cap, minimum=request.minimum,
            compression=request.compression,
        )  # fmt: skip
        wanted = merge(overrides, self.config.pools.get(request.name, _NO_CONFIG))
        if request.away and self.pools.owner(request.name) is None:
            self._check_settings(request.name, wanted)
        else:
            with self.pools.pool(request.name, control=True) as found:
                self._check(found, wanted)
        await self._keep({request.name: overrides})
        self._renew(request.name)

    def _renew(self, name: str) -> None:
        """Make what is kept hold, if the pool is still there."""
        if self.pools.owner(name) is not None:
            with self.pools.pool(name, control=True) as found:
                self._apply(found)
                self._cap(found)

    def _cap(self, found: Pool) -> None:
        """A cap holds at once, not only when the next target is found."""
        cap, target = self.settings(found.name).cap, poolfile.read_control(found.fd).target
        if cap is not None and (target is None or target > cap):
            poolfile.write_target(found.fd, cap)

    def _check(self, found: Pool, wanted: PoolSettings) -> None:
        """Refuse what the device or the host could not keep to, among what is new."""
        old = self.settings(found.name)
        if wanted.target is not None and wanted.target != old.target:
            found.check_size("target", wanted.target)
        if wanted.cap is not None and wanted.cap != old.cap:
            found.check_size("cap", wanted.cap)
        if wanted.minimum > old.minimum:
            found.check_size("minimum", wanted.minimum)
        self._check_settings(found.name, wanted)

    def _check_settings(self, name: str, wanted: PoolSettings) -> None:
        """The same, as far as it needs no pool."""
        old = self.settings(name)
        if (wanted.minimum, wanted.target, wanted.cap) != (old.minimum, old.target, old.cap):
            _check_order(name, wanted)
        if wanted.promised > old.promised:
            self._check_promises(name, wanted.promised)

    def _check_promises(self, name: str, promised: int) -> None:
        others = {other: self.settings(other).promised for other in self._names() if other != name}
        there, wanted = self._most(), sum(others.values()) + promised
        if wanted > there:
            away = ", ".join(sorted(name for name in others.keys() - set(self.pools.names()) if others[name]))
            raise PoolError(
                f"pool {name}: minimums and fixed targets would be {format_size(wanted)} in all,"
                f" and the host gives at most {format_size(there)} (budget.maximum, or the size of the tmpfs)"
                + (f"; those of pools that are away count, {away}: destroy what does not come back" if away else "")
            )

    async def _freeze(self, name: str, frozen: bool) -> None:
        with self.pools.pool(name, control=True) as found:
            found.finished()
        await self._keep({name: self._changed(name, frozen=frozen)})
        self._renew(name)

    async def _freeze_all(self, frozen: bool) -> None:
        """Every pool there is, and those that may come back.

        Where what is kept is of another owner's pool it stays, and this one is frozen as long as it is there.
        """
        names = {*self.pools.names(), *self._store.names()}
        others = {name for name in names if self._is_of_another(name)}
        await self._keep({name: self._changed(name, frozen=frozen) for name in names - others})

        def apply(found: Pool) -> None:
            self._apply(found)
            if found.name in others:
                poolfile.write_frozen(found.fd, frozen)

        if failed := self.pools.adopt_all(apply):
            raise PoolError(f"all pools were {'frozen' if frozen else 'thawed'} but {', '.join(sorted(failed))}")

    async def _destroy(self, request: protocol.Destroy) -> None:
        name = request.name
        if name in self.pools.names() or name not in self._store.names():
            self.pools.destroy(name, lose_pages=request.lose_pages)
        if not request.keep_settings:
            await self._keep({name: Overrides()})

    async def _rename(self, name: str, to: str) -> None:
        if there := {name, to}.intersection(self.pools.names()):
            raise PoolError(f"pool {there.pop()} is there: only what is away is renamed")
        if name in self._store.names():
            await self._keep({name: Overrides(), to: self._store.of(name)})

    def _apply(self, found: Pool) -> None:
        """Make the control page say what the settings say."""
        if self._owners.get(found.name) != found.uid():
            self._owners[found.name] = found.uid()
            self._merged.pop(found.name, None)
            if self._is_of_another(found.name):
                _log.warning(
                    "pool %s belongs to user %d: what was set for user %d's pool of that name does not hold",
                    found.name, found.uid(), self._store.of(found.name).owner,
                )  # fmt: skip
        settings = self.granted(found.name)
        if poolfile.read_control(found.fd).compression != settings.compression:
            poolfile.write_compression(found.fd, settings.compression)
        if self._kept(found.name).frozen not in (UNSET, poolfile.read_control(found.fd).frozen):
            poolfile.write_frozen(found.fd, settings.frozen)
        if settings.pinned is not None and settings.pinned != poolfile.read_control(found.fd).target:
            poolfile.write_target(found.fd, settings.pinned)


def _check_order(name: str, wanted: PoolSettings) -> None:
    """Raise PoolError unless minimum <= target <= cap, as far as they are set."""
    sizes = (("minimum", wanted.minimum), ("target", wanted.target), ("cap", wanted.cap))
    given = [(what, size) for what, size in sizes if size is not None]
    for (low_name, low), (high_name, high) in pairwise(given):
        if low > high:
            raise PoolError(
                f"pool {name}: a {low_name} of {format_size(low)} is above its {high_name}, {format_size(high)}"
            )
