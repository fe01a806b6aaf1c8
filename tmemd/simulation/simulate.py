# SPDX-License-Identifier: BSD-3-Clause
"""Replay a recording through a policy: what it would have cost.

What guests ask for hardly depends on where their pages are: how many pages they put, read and free, and how long ago
each was last used. That is what a recording's counters say by age, whatever policy held. docs/policies.md says what
follows from them, and what cannot be known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import msgspec

from tmemd.device.maintenance import TICK
from tmemd.governor.governor import limit_raises
from tmemd.policy import Demand, Policy, demand
from tmemd.policy.demand import ENOUGH_PAGES, FIRST_PAGE_BYTES, FIRST_READ_SECONDS
from tmemd.simulation.recording import PoolRecord, Record, Recording
from tmemd.simulation.storemodel import Copies, Counts, Flow, Space, Store
from tmemd.store.poolfile import GENERATION_SECONDS, GENERATIONS, Ages
from tmemd.store.sample import PoolSample

# Where a recording has too few to measure it by: pages of 4 KiB on an NVMe drive of a cloud, one at a time.
DEFAULT_WRITE_SECONDS: Final = 50e-6
_STEPS: Final = 20  # in one interval, at most


class Times(msgspec.Struct, frozen=True):
    """What it takes to read a page from the file, and to write one, in seconds; whether each was measured.

    *sources*: to read one from the source of an ephemeral pool, by the pool's name. *said*: to read one of a pool
    whatever was measured; a page is written there as much slower, or faster, as it is read.
    """

    read: float
    write: float
    read_measured: bool
    write_measured: bool
    sources: dict[str, float] = {}
    said: dict[str, float] = {}

    def cost(self, name: str, counts: Counts) -> float:
        """Seconds of the disk's time, of what the pool did."""
        read = self.said.get(name, self.sources.get(name, self.read))
        write = self.write * (read / self.read if name in self.said else 1.0)
        return counts.file_reads * read + (counts.spills + counts.demotion_writes) * write


class Outcome(msgspec.Struct, frozen=True):
    """What one policy would have cost."""

    cost_seconds: float
    total: Counts
    pools: dict[str, Counts]


@dataclass
class _Mean:
    """How long pages took."""

    nanoseconds: int = 0
    pages: int = 0

    def add(self, nanoseconds: int, pages: int) -> None:
        self.nanoseconds += nanoseconds
        self.pages += pages

    @property
    def is_known(self) -> bool:
        return self.pages >= ENOUGH_PAGES

    def seconds(self, otherwise: float) -> float:
        """Of one."""
        return self.nanoseconds / self.pages / 1e9 if self.is_known else otherwise


def times(recording: Recording) -> Times:
    """From the latencies in a recording, as far as it has some."""
    reads, writes, sources = _Mean(), _Mean(), defaultdict[str, _Mean](_Mean)
    for before, now in _pairs(recording.records):
        counters, earlier = now.sample.counters, before.sample.counters
        of = sources[now.sample.name] if now.sample.is_ephemeral else reads
        of.add(now.file_read_ns - before.file_read_ns, counters.file_reads - earlier.file_reads)
        if not now.sample.is_ephemeral:
            writes.add(now.spill_ns - before.spill_ns, counters.spills - earlier.spills)
    return Times(
        reads.seconds(FIRST_READ_SECONDS), writes.seconds(DEFAULT_WRITE_SECONDS), reads.is_known, writes.is_known,
        {name: mean.seconds(FIRST_READ_SECONDS) for name, mean in sources.items()},
    )  # fmt: skip


def recorded(recording: Recording) -> dict[str, Counts]:
    """What really happened while it was recorded, by pool."""
    pools: dict[str, Counts] = {}
    for before, now in _pairs(recording.records):
        counters, earlier = now.sample.counters, before.sample.counters
        change = {name: getattr(counters, name) - getattr(earlier, name) for name in Counts.__dataclass_fields__}
        change["puts"] = _puts(before.sample, now.sample)
        if now.sample.is_ephemeral:
            change["spills"] = 0  # each write goes to the source, whatever the policy
        name = now.sample.name
        pools[name] = pools.get(name, Counts()) + Counts(**change)
    return pools


def outcome(pools: dict[str, Counts], of: Times) -> Outcome:
    """Summed up and priced."""
    total = sum(pools.values(), Counts())
    return Outcome(sum(of.cost(name, counts) for name, counts in pools.items()), total, pools)


def simulate(
    recording: Recording, policy: Policy, budget: int | None = None, said: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Counts]:
    """What each pool would have done under *policy*; *budget*, in bytes, stands in for the recorded one.

    *said*: seconds that a page takes to be read from the file, by pool, as far as it is not to be as recorded.
    """
    pools: dict[str, _Pool] = {}
    gone: dict[str, Counts] = {}
    counting = {
        each.sample.name for record in recording.records for each in record.pools if each.sample.ages.generation
    }
    last = 0.0
    for record in recording.records:
        demands = []
        for now in record.pools:
            pool = pools.get(now.sample.name)
            if pool is None or not _follows(pool.now, now):
                if pool:
                    gone[now.sample.name] = gone.get(now.sample.name, Counts()) + pool.store.counts
                pool = pools[now.sample.name] = _Pool(
                    now, counts_generations=now.sample.name in counting, read_seconds=said.get(now.sample.name)
                )
            else:
                pool.advance(now, record.at, record.at - last)
            demands.append(pool.demand())
        targets = policy(demands, record.budget_bytes if budget is None else budget)
        owed = sum(max(0, each.used - targets[each.name]) for each in demands)
        for name, target in limit_raises(demands, targets, owed).items():
            pools[name].target = target
        last = record.at
    return {name: pool.store.counts + gone.get(name, Counts()) for name, pool in pools.items()}


class _Pool:
    """A pool as it would be: the recorded one's demand on a modelled store."""

    def __init__(self, first: PoolRecord, *, counts_generations: bool, read_seconds: float | None) -> None:
        self.now = first
        self._read_seconds = read_seconds  # None: as recorded
        self._counts_generations = counts_generations  # otherwise the clock says when one ends
        self._first = first.sample.counters
        self.target = first.sample.target_bytes
        self.store = (Copies if first.sample.is_ephemeral else Store)(_pages_of(first.sample))
        self._page = _page_bytes(first.sample, FIRST_PAGE_BYTES)
        self._ages = _published(first.sample.ages, self.store, self._page)
        self._before: PoolSample | None = None
        self._demand: Demand | None = None
        self._sample = self._modelled()

    def advance(self, now: PoolRecord, at: float, seconds: float) -> None:
        """Go on to the next record, *seconds* later, under the target that holds."""
        flow = _flow(self.now.sample, now.sample)
        if self._counts_generations:
            ended = _generations(self.now.sample, now.sample)
        else:
            ended = int(at // GENERATION_SECONDS - (at - seconds) // GENERATION_SECONDS)
        for _ in range(min(GENERATIONS, ended)):
            self.store.age()
        self._page = _page_bytes(now.sample, self._page)
        space = Space(self.target, now.sample.counters.index_bytes, self._page, now.sample.frozen)
        steps = max(1, min(_STEPS, round(seconds / TICK)))
        part = Flow(flow.puts / steps, [n / steps for n in flow.freed], [n / steps for n in flow.reads])
        for _ in range(steps):
            self.store.apply(part, space)
            self.store.maintain(space, seconds / steps)
        if now.sample.ages.published != self.now.sample.ages.published:
            self._ages = _published(now.sample.ages, self.store, self._page)
        self.now = now
        self._before, self._sample = self._sample, self._modelled()

    def demand(self) -> Demand:
        """What a policy goes by."""
        sample = msgspec.structs.replace(self._sample, target_bytes=self.target)
        self._demand = demand(self._before, sample, self._demand)
        return self._demand

    def _modelled(self) -> PoolSample:
        """The sample that the governor would have taken."""
        sample, store = self.now.sample, self.store
        counts, recorded_reads = store.counts, sample.counters.file_reads
        file_reads = self._first.file_reads + int(counts.file_reads)
        counters = msgspec.structs.replace(
            sample.counters,
            puts=int(counts.puts + counts.promotions) if sample.is_ephemeral else sample.counters.puts,
            used_bytes=sample.counters.index_bytes + int(store.in_ram * self._page),
            pages_in_tmem=int(store.in_ram),
            pages_in_file=int(store.in_file),
            puts_refused=int(counts.spills),
            gets=self._first.gets + int(counts.gets),
            file_reads=file_reads,
            spills=int(counts.spills),
            demotions=int(counts.demotions),
            demotion_writes=int(counts.demotion_writes),
            promotions=int(counts.promotions),
        )
        file_read_ns = self.now.file_read_ns * file_reads // recorded_reads if recorded_reads else 0
        if self._read_seconds is not None:
            file_read_ns = int(self._read_seconds * 1e9) * file_reads
        return msgspec.structs.replace(sample, counters=counters, ages=self._ages, file_read_ns=file_read_ns)


def _pairs(records: Sequence[Record]) -> Iterator[tuple[PoolRecord, PoolRecord]]:
    """Each pool's neighbouring records, as long as it is the same pool."""
    for earlier, later in pairwise(records):
        before = {pool.sample.name: pool for pool in earlier.pools}
        for now in later.pools:
            old = before.get(now.sample.name)
            if old and _follows(old, now):
                yield old, now


def _follows(before: PoolRecord, now: PoolRecord) -> bool:
    """Whether it is still the same pool: what is counted never falls."""
    old, new = before.sample.counters, now.sample.counters
    return old.puts <= new.puts and old.reads <= new.reads and old.writes <= new.writes


def _puts(before: PoolSample, now: PoolSample) -> int:
    """The pages that the guest wrote, but for zeros: of an ephemeral pool, those stored; it also puts what it reads."""
    counters, earlier = now.counters, before.counters
    puts = counters.puts - earlier.puts
    if now.is_ephemeral:
        return puts - counters.puts_refused + earlier.puts_refused - counters.promotions + earlier.promotions
    return puts - (counters.puts_zero - earlier.puts_zero)


def _flow(before: PoolSample, now: PoolSample) -> Flow:
    gets = _change(before.ages.gets, now.ages.gets)
    file_reads = _change(before.ages.file_reads, now.ages.file_reads)
    return Flow(
        max(0, _puts(before, now)),
        _change(before.ages.freed, now.ages.freed),
        [get + read for get, read in zip(gets, file_reads, strict=True)],
    )


def _change(before: Sequence[int], now: Sequence[int]) -> list[int]:
    return [max(0, new - old) for old, new in zip(before, now, strict=True)]


def _generations(before: PoolSample, now: PoolSample) -> int:
    """How many ended meanwhile. A new device's first counts as 0 until it ends."""
    return (max(now.ages.generation, 1) - max(before.ages.generation, 1)) % (GENERATIONS - 1)


def _page_bytes(sample: PoolSample, otherwise: float) -> float:
    """What a page in tmem takes; *otherwise* where there are too few to tell."""
    counters = sample.counters
    if counters.pages_in_tmem < ENOUGH_PAGES:
        return otherwise
    return max(1.0, (counters.used_bytes - counters.index_bytes) / counters.pages_in_tmem)


def _published(ages: Ages, store: Store, page: float) -> Ages:
    """The age statistics that the model would publish."""
    stored = tuple(int(n * page) for n in store.ram_by_age())
    return msgspec.structs.replace(ages, stored_bytes=stored, in_file_pages=tuple(map(int, store.pages[2])))


def _pages_of(sample: PoolSample) -> list[list[float]]:
    """The pages of a pool by place and age, as last published; of what is not known, as old as can be."""
    counters, ages = sample.counters, sample.ages
    in_ram, none = _spread(counters.pages_in_tmem, ages.stored_bytes), [0.0] * GENERATIONS
    return [
        *((none, in_ram) if sample.is_ephemeral else (in_ram, none)),
        _spread(counters.pages_in_file, ages.in_file_pages),
    ]


def _spread(pages: int, like: Sequence[int]) -> list[float]:
    known = sum(like)
    return [pages * n / known for n in like] if known else [0.0] * (GENERATIONS - 1) + [float(pages)]
