# SPDX-License-Identifier: BSD-3-Clause
"""Gives each pool its target, tick after tick: what the host can spare, shared out by a policy.

What decides is elsewhere and pure: `budget` says how much there is, a policy who gets what, `writes` what demotion may
write to backing files. Here the host and the pools are observed, and targets written. `explain` says why, for a log.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tmemd import policy
from tmemd.daemonconfig import DaemonConfig
from tmemd.events import Seen
from tmemd.governor.budget import Budget, Limits, MemoryState
from tmemd.governor.explain import explain
from tmemd.governor.host import Memory, read_memory
from tmemd.governor.observer import Observation, Observer
from tmemd.governor.writes import WriteAllowance, Writer, granted
from tmemd.policy import Demand, Policy, demand
from tmemd.protocol import Attach, HostStatus, PoolStatus
from tmemd.settings import PoolSettings
from tmemd.sizes import format_size
from tmemd.store import poolfile
from tmemd.store.directory import Pools
from tmemd.store.pool import Stray
from tmemd.store.poolfile import PoolError
from tmemd.store.sample import PoolSample

_log: Final = logging.getLogger("tmemd")

TICK: Final = 0.5  # seconds
# A frozen pool keeps what it takes, and this much more so that nothing has to be demoted to keep within the target.
_FROZEN_ROOM: Final = 4 << 20

# Of its share, a pool without a file may grow by this until the next tick, at twice the 60,000 incompressible pages a
# second that one client writes at its fastest: nobody else takes the pages that it refuses.
_ROOM_WITHOUT_FILE: Final = 256 << 20

_T = TypeVar("_T")


class Governor:
    """Call `tick` every TICK seconds."""

    def __init__(
        self,
        pools: Pools,
        settings: Callable[[str], PoolSettings],
        config: DaemonConfig,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Govern what *pools* keeps; *settings* says what was set for a pool. Raises PoolError, ValueError.

        *root* stands in for / where the host is looked at.
        """
        self._pools = pools
        self._settings = settings
        self._observer = Observer(settings)
        self._root = root
        self._clock = clock
        self._memory = read_memory(root)
        self._ticked = clock()
        self._observed: Mapping[str, Observation] = {}
        self._strays: Sequence[Stray] = ()
        self._demands: Mapping[str, Demand] = {}  # of each pool, in the last tick
        self._budget: Budget | None = None
        self._writes: WriteAllowance | None = None
        self._status: HostStatus | None = None
        self._promised = 0  # bytes given to those who attached since the last tick
        self._unwritable: set[str] = set()
        self.configure(config)

    def configure(self, config: DaemonConfig) -> None:
        """Go by this from the next tick on. Raises ValueError for a policy that is none."""
        self._policy: Policy = policy.by_name(config.policy)
        self._config = config

    @property
    def status(self) -> HostStatus:
        """What the last tick found; before the first, that is made now. Raises PoolError, OSError."""
        return self._status or self.tick()

    @property
    def samples(self) -> list[PoolSample]:
        """The served pools as the last tick saw them."""
        return [each.sample for each in self._observed.values() if each.sample]

    def measured(self, status: PoolStatus) -> PoolStatus:
        """The status with what a miss costs of late, as the policy knows it, in place of what it did on average."""
        known = self._demands.get(status.name)
        if known is None or known.read_unknown:
            return status
        return msgspec.structs.replace(status, miss_seconds=known.read_seconds)

    def seen(self) -> dict[str, Seen]:
        """Every pool as the last tick left it, for who tells what happens."""
        return {name: _seen(each) for name, each in self._observed.items()}

    def tick(self) -> HostStatus:
        """Look at the host and at every pool, and set targets and write allowances. Raises PoolError, OSError."""
        now = self._clock()
        seconds, self._ticked = max(now - self._ticked, 1e-3), now
        before, self._memory = self._memory, read_memory(self._root)
        self._observed = self._observer.look(self._pools.kept())
        self._strays = self._pools.strays()
        stray_bytes = sum(stray.taken for stray in self._strays)
        tightest, state = self._memory_state(before, seconds, stray_bytes)
        if state.spare < 0:
            self._flush_idle()
        budget = self._next_budget(state)
        self._set_targets(budget, budget.bytes - stray_bytes, short=state.spare < 0)
        self._allow_writes(seconds, short=state.spare < 0)
        some, full = _stalled(before[0], self._memory[0], seconds)
        self._promised = 0
        self._status = HostStatus(
            policy=self._config.policy,
            budget_bytes=budget.bytes,
            targets_bytes=self._committed() + stray_bytes,
            used_bytes=state.used,
            total_bytes=tightest.total,
            available_bytes=tightest.available,
            reserve_bytes=self._reserve(tightest),
            pressure_some=some,
            pressure_full=full,
            writes_left_bytes=self._writes.left_bytes if self._writes else None,
        )
        return self._status

    def _memory_state(self, before: Sequence[Memory], seconds: float, stray_bytes: int) -> tuple[Memory, MemoryState]:
        """Of the host, or of the cgroup that has the least to spare."""
        number, tightest = min(enumerate(self._memory), key=lambda found: self._spare(found[1]))
        comparable = len(before) == len(self._memory)  # otherwise its pressure may have been another group's
        return tightest, MemoryState(
            total=tightest.total,
            spare=self._spare(tightest),
            used=sum(each.taken for each in self._observed.values()) + stray_bytes,
            pressure=(comparable and _stalled(before[number], tightest, seconds)[0]) or 0.0,
        )

    def first_target(self, request: Attach, wanted: int) -> int:
        """What a device that attaches may take until the next tick: at most *wanted* bytes. Raises PoolError, OSError.

        Never less than its minimum, nor than what its pool takes already: nothing is demoted because a plugin was
        restarted. Without a file never less than its share, for what it refuses are I/O errors.
        """
        status, known = self.status, self._observed.get(request.name)
        weights = sum(each.settings.weight for each in self._observed.values() if each is not known)
        settings = self._settings(request.name)
        share = 0 if request.has_file else status.budget_bytes * settings.weight // (weights + settings.weight)
        mine, taken = (known.committed, known.taken) if known else (0, 0)
        left = status.budget_bytes - status.targets_bytes + mine - self._promised
        first = min(wanted, max(left, taken, share, settings.minimum))
        self._promised += max(first - mine, 0)
        return first

    def admit(self, uid: int) -> None:
        """Raise PoolError where a user's pools that nobody serves take more than his share already."""
        idle, budget = self._idle().get(uid), self.status.budget_bytes
        owners = {each.owner for each in self._observed.values()} | {stray.uid for stray in self._strays}
        if idle and idle > budget // len(owners):
            raise PoolError(
                f"user {uid} has pools that nobody serves and that take {format_size(idle)} of RAM, more than a share"
                f" of {format_size(budget // len(owners))}: serve them, or have them destroyed"
            )

    def _committed(self) -> int:
        return sum(each.committed for each in self._observed.values())

    def _idle(self) -> Counter[int]:
        """By user: the bytes of RAM in pools that no policy can have demoted, for nobody serves them as pools."""
        idle = Counter[int]()
        for each in self._observed.values():
            if each.sample is None:
                idle[each.owner] += each.taken
        for stray in self._strays:
            idle[stray.uid] += stray.taken
        return idle

    def _flush_idle(self) -> None:
        """Let go of copies in pools that nobody serves: nobody misses them now."""
        for each in self._observed.values():
            with suppress(PoolError, OSError):
                identity = each.pool.identity() if each.sample is None else None
                if identity and identity.is_ephemeral and each.taken > identity.index_offset and each.pool.flush():
                    each.taken = each.pool.taken()
                    _log.info("pool %s flushed: the host is short of memory, and nobody serves it", each.pool.name)

    def _reserve(self, memory: Memory) -> int:
        """In a cgroup, the same share of its memory as of the host's."""
        host = self._memory[0].total
        return min(self._config.budget.reserve.of(host), host) * memory.total // host

    def _spare(self, memory: Memory) -> int:
        return memory.available - self._reserve(memory)

    def _next_budget(self, state: MemoryState) -> Budget:
        total = min(memory.total for memory in self._memory)
        asked = self._config.budget
        # Targets that the pools' tmpfs cannot hold would be kept by nobody: who puts first would have it all.
        maximum = min(asked.maximum.of(total), total, self._pools.capacity())
        limits = Limits(minimum=min(asked.minimum.of(total), maximum), maximum=maximum, pressure=asked.pressure / 100)
        if self._budget is None:
            # What targets add up to already: a tmemd that comes back changes nothing at once.
            self._budget = Budget(limits, self._committed() if self.samples else None)
        self._budget.limits = limits
        self._budget.step(state)
        return self._budget

    def _set_targets(self, budget: Budget, left: int, *, short: bool) -> None:
        """Share out what strays have *left* of the budget, and write what changed."""
        fixed = {name: kept for name, each in self._observed.items() if (kept := _fixed(each, short=short)) is not None}
        left = max(left - sum(fixed.values()), 0)
        self._demands = {
            name: demand(each.before, each.sample, self._demands.get(name))
            for name, each in self._observed.items()
            if each.sample and name not in fixed
        }
        demands = _limit_without_file(list(self._demands.values()), left)
        shares = self._share_out(demands, budget.bytes, left) | fixed
        owed = sum(max(each.taken - shares[name], 0) for name, each in self._observed.items() if each.sample)
        targets = shares | limit_raises(demands, shares, owed)
        for name, each in self._observed.items():
            if each.sample and each.control and targets[name] != each.control.target:
                self._write(each, poolfile.write_target, targets[name])
                each.sample = msgspec.structs.replace(each.sample, target_bytes=targets[name])
        if _log.isEnabledFor(logging.DEBUG):
            overdrawn = self._overdrawn(budget.bytes)
            if changes := explain(self._observed, demands, shares, targets, budget=budget, overdrawn=overdrawn):
                _log.debug("budget %s, targets %s", format_size(budget.bytes), changes)

    def _share_out(self, demands: Sequence[Demand], budget: int, left: int) -> dict[str, int]:
        """Share out what is *left* of the budget. Who takes too much where nobody serves it has the less elsewhere."""
        targets: dict[str, int] = {}
        for owner, share in self._overdrawn(budget).items():
            own = [each for each in demands if self._observed[each.name].owner == owner]
            targets |= self._policy(own, min(share, left))
        rest = [each for each in demands if each.name not in targets]
        return targets | self._policy(rest, max(left - sum(targets.values()), 0))

    def _overdrawn(self, budget: int) -> dict[int, int]:
        """Users among several whose idle pools take more than these' share, and what is left to their other pools."""
        if not (idle := self._idle()):
            return {}
        pools = [(each.owner, each.settings.weight, each.sample is None) for each in self._observed.values()]
        pools += [(stray.uid, self._settings(stray.name).weight, True) for stray in self._strays]
        weights, idle_weights = Counter[int](), Counter[int]()
        for owner, weight, is_idle in pools:
            weights[owner] += weight
            idle_weights[owner] += weight * is_idle
        total = weights.total()
        return {
            owner: max(budget * weights[owner] // total - taken, 0)
            for owner, taken in idle.items()
            if len(weights) > 1 and taken > budget * idle_weights[owner] // total
        }

    def _allow_writes(self, seconds: float, *, short: bool) -> None:
        """Share out what demotion may write, which is nothing to an ephemeral pool. Below the reserve all it likes."""
        writing = [
            each for each in self._observed.values()
            if each.sample and each.sample.has_file and not each.sample.is_ephemeral
        ]  # fmt: skip
        writers = [_writer(each) for each in writing]
        per_hour = self._config.demotion.writes_per_hour
        bounds: Sequence[int | None] = [None] * len(writers)
        if per_hour is None:
            self._writes = None
        else:
            if self._writes is None or self._writes.per_hour != per_hour:
                self._writes = WriteAllowance(per_hour, granted(writers))
            self._writes.pass_time(seconds, sum(map(_written, writing)))
            bounds = bounds if short else self._writes.share(writers)
        for each, writer, bound in zip(writing, writers, bounds, strict=True):
            if bound != writer.bound:
                self._write(each, poolfile.write_demotion_writes, bound)

    def _write(self, each: Observation, write: Callable[[int, _T], None], value: _T) -> None:
        """One that cannot be written, such as one whose owner made a hole of it in a full tmpfs, holds no other up."""
        try:
            write(each.pool.fd, value)
        except OSError as error:
            if each.pool.name not in self._unwritable:
                _log.warning("pool %s cannot be told its target: %s", each.pool.name, error.strerror)
            self._unwritable.add(each.pool.name)
        else:
            self._unwritable.discard(each.pool.name)


def _seen(each: Observation) -> Seen:
    sample = each.sample
    if sample is None:
        return Seen(each.owner, None, each.committed, 0, 0, 0)
    return Seen(each.owner, sample.counters.pid, sample.target_bytes, sample.counters.puts_refused, *each.connections)


def _limit_without_file(demands: Sequence[Demand], budget: int) -> list[Demand]:
    """The demands, those of pools without a file limited to their share by weight.

    What they have cannot be taken back, so no more is lent; and within it they must not refuse.
    """
    weights = sum(each.weight for each in demands)
    return [each if each.has_file else _limited(each, budget * each.weight // weights) for each in demands]


def _limited(demand: Demand, share: int) -> Demand:
    least = max(demand.minimum, min(demand.used + _ROOM_WITHOUT_FILE, share, demand.cap))
    return msgspec.structs.replace(demand, minimum=least, cap=max(least, min(demand.cap, share)))


def limit_raises(demands: Sequence[Demand], targets: Mapping[str, int], owed: int) -> dict[str, int]:
    """The targets of *demands*, raised only as far as memory is there: less *owed*, what pools have to give back first.

    A pool that has to shrink does so at the speed of its disk, and who may grow does so at the speed of RAM.
    """
    raises = {each.name: targets[each.name] - max(each.target, each.minimum) for each in demands}
    raised = sum(nbytes for nbytes in raises.values() if nbytes > 0)
    withheld = min(owed, raised)
    return {
        name: targets[name] - (-(-nbytes * withheld // raised) if nbytes > 0 else 0) for name, nbytes in raises.items()
    }


def _fixed(each: Observation, *, short: bool) -> int | None:
    """What the pool keeps whatever a policy would say, in bytes; None: that is the policy's to say.

    Being frozen keeps new pages out and old ones in, except while the host is *short* of its reserve.
    """
    if each.sample is None:
        return each.taken
    if each.settings.pinned is not None:
        return min(each.settings.pinned, each.sample.counters.limit_bytes)
    if each.sample.frozen and not short:
        keeps = max(each.taken, min(each.sample.target_bytes, each.taken + each.taken // 8 + _FROZEN_ROOM))
        return keeps if each.settings.cap is None else min(keeps, each.settings.cap)
    return None


def _stalled(before: Memory, now: Memory, seconds: float) -> tuple[float | None, float | None]:
    """Which share of the time some task, and all tasks, waited for memory."""
    if before.stalls is None or now.stalls is None:
        return None, None
    some, full = now.stalls.some_us - before.stalls.some_us, now.stalls.full_us - before.stalls.full_us
    return tuple(min(max(us / 1e6 / seconds, 0.0), 1.0) for us in (some, full))  # type: ignore[return-value]


def _writer(each: Observation) -> Writer:
    assert each.sample
    assert each.control
    over = max(each.taken - each.sample.target_bytes, 0)
    return Writer(each.sample.counters.demotion_writes, over, each.control.demotion_writes)


def _written(each: Observation) -> int:
    """Pages since the tick before."""
    assert each.sample
    now = each.sample.counters.demotion_writes
    return now - each.before.counters.demotion_writes if each.before else 0
