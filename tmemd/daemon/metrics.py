"""What Prometheus gets: a snapshot of all pools and of the host, as metrics.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): base units, `_total` for
what is only ever counted up. docs/monitoring.md lists them; a test holds that list against this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tmemd import version
from tmemd.protocol import HostStatus, PoolStatus, Problem
from tmemd.store.poolfile import LATENCY_BOUNDS_NS, Histogram, Latencies

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


class TickTimes(prometheus_client.Histogram):
    """How long each tick of the governor took. Use `with times.time():`."""

    def __init__(self) -> None:
        super().__init__(
            "tmemd_governor_tick_seconds",
            "How long it took to look at the host and all pools, and to set targets.",
            registry=None,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        )


@dataclass(frozen=True)
class Snapshot:
    """What one scrape tells."""

    pools: Sequence[PoolStatus]  # with latencies
    host: HostStatus | None = None
    ticks: TickTimes | None = None
    problems: Sequence[Problem] = ()


# Every second bound, from 512 ns to 1.07 s: an octave is as fine as a quantile over minutes can make use of, and each
# bucket is a time series for each pool and operation.
_EVERY_OTHER: Final = range(2, len(LATENCY_BOUNDS_NS), 2)

_EVERY_POOL_GAUGES: Final[Mapping[str, tuple[str, Callable[[PoolStatus], float]]]] = {
    "damaged": ("Whether the pool cannot be used.", lambda pool: pool.error is not None),
    "unfinished": ("Whether no plugin has made it a pool yet.", lambda pool: pool.unfinished),
    "taken_bytes": ("RAM that the pool's file takes, as the kernel counts it.", lambda pool: pool.taken_bytes),
}

_POOL_GAUGES: Final[Mapping[str, tuple[str, Callable[[PoolStatus], float | None]]]] = {
    "size_bytes": ("Size of the device.", lambda pool: pool.size),
    "target_bytes": ("RAM that the pool may take now.", lambda pool: pool.target_bytes),
    "used_bytes": ("RAM that the pool takes, its index included.", lambda pool: pool.counters.used_bytes),
    "limit_bytes": ("RAM that the device itself takes at most.", lambda pool: pool.counters.limit_bytes),
    "payload_bytes": ("What the pages in tmem take compressed.", lambda pool: pool.counters.payload_bytes),
    "index_bytes": ("RAM that the index takes.", lambda pool: pool.counters.index_bytes),
    "freeable_bytes": ("RAM that demotion could give back.", lambda pool: pool.freeable_bytes),
    "map_granules_set": ("Granules of the backing file that are not to be trusted if the host dies.",
                         lambda pool: pool.counters.regions_set),
    "weight": ("The share that was set for it.", lambda pool: pool.settings.weight),
    "minimum_bytes": ("What its target may not be pushed below.", lambda pool: pool.settings.minimum),
    "cap_bytes": ("What its target may not rise above; absent without a cap.", lambda pool: pool.settings.cap),
    "pinned_target_bytes": ("The target that was set by hand; absent where the policy finds it.",
                            lambda pool: pool.settings.target),
    "compression_enabled": ("Whether pages are compressed.", lambda pool: pool.settings.compression),
    "frozen": ("Whether puts are refused because it was frozen.", lambda pool: pool.frozen),
    "sync_failed": ("Whether a sync of the backing file failed: nothing is durable until the pool is made anew.",
                    lambda pool: pool.counters.sync_failed != 0),
    "served": ("Whether a plugin serves the device.", lambda pool: pool.served),
    "never_trims": ("Whether the guest swaps and never says which pages are dead, so that they fill tmem.",
                    lambda pool: pool.never_trims),
}  # fmt: skip

_POOL_COUNTERS: Final = {
    "puts": "Pages offered to tmem, refused ones included.",
    "puts_refused": "Pages offered to tmem that it did not take.",
    "puts_zero": "Pages of zeros offered to tmem.",
    "puts_same": "Pages offered to tmem that repeat one word.",
    "puts_raw": "Pages stored in tmem as they are, for they do not compress.",
    "gets": "Pages read from tmem.",
    "file_reads": "Pages read from the backing file.",
    "invalidates": "Pages in tmem dropped by overwrite, trim or zero.",
    "spills": "Pages written to the backing file because their put was refused.",
    "demotions": "Pages moved from tmem to the backing file.",
    "demotion_writes": "Pages that demotion wrote to the backing file.",
    "promotions": "Pages put again when they were read from the backing file.",
    "moves": "Records moved by compaction.",
    "bad_checksums": "Pages whose checksum was wrong.",
    "io_errors": "Requests that failed.",
}

_HOST_GAUGES: Final[Mapping[str, tuple[str, Callable[[HostStatus], float | None]]]] = {
    "budget_bytes": ("What the targets of all pools together may be.", lambda host: host.budget_bytes),
    "targets_bytes": ("What the targets of all pools together are.", lambda host: host.targets_bytes),
    "used_bytes": ("RAM that all pools together take.", lambda host: host.used_bytes),
    "host_memory_total_bytes": ("RAM of the host, or of the cgroup that tmemd runs in.", lambda host: host.total_bytes),
    "host_memory_available_bytes": ("RAM that is available on the host.", lambda host: host.available_bytes),
    "host_memory_reserve_bytes": ("RAM that is to stay available on the host.", lambda host: host.reserve_bytes),
    "demotion_writes_left_bytes": ("What demotion may write now; absent without a bound.",
                                   lambda host: host.writes_left_bytes),
}  # fmt: skip


def exposition(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' text format, of CONTENT_TYPE. It only reads what it is given: any thread may call."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(snapshot))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All metrics of the snapshot."""
        yield InfoMetricFamily("tmemd_build", "Which tmemd this is.", {"version": version()})
        if self._snapshot.host:
            yield from _of_host(self._snapshot.host)
        if self._snapshot.ticks:
            yield from _without_creation(self._snapshot.ticks.collect())
        yield _of_problems(self._snapshot.problems)
        yield _gauge("tmemd_pools", "Pools there are.", len(self._snapshot.pools))
        yield from _of_pools(self._snapshot.pools)


def _of_problems(problems: Iterable[Problem]) -> Metric:
    gauge = GaugeMetricFamily(
        "tmemd_problem", "1 for each thing that keeps tmemd from doing as it was told.", labels=["what", "words"]
    )
    for problem in problems:
        gauge.add_metric([problem.what, problem.words], 1)
    return gauge


def _of_host(host: HostStatus) -> Iterator[Metric]:
    yield InfoMetricFamily("tmemd_policy", "How the budget is shared out.", {"policy": host.policy})
    for name, (text, value) in _HOST_GAUGES.items():
        number = value(host)
        if number is not None:
            yield _gauge(f"tmemd_{name}", text, number)
    pressure = GaugeMetricFamily(
        "tmemd_host_memory_pressure_ratio",
        "Share of the time in which some task, and all tasks, waited for memory; absent where the kernel does not say.",
        labels=["kind"],
    )
    for kind, share in (("some", host.pressure_some), ("full", host.pressure_full)):
        if share is not None:
            pressure.add_metric([kind], share)
    yield pressure


def _without_creation(families: Iterable[Metric]) -> Iterator[Metric]:
    """When somebody began to count is of no use, and would be a time series of its own."""
    for family in families:
        family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _of_pools(pools: Sequence[PoolStatus]) -> Iterator[Metric]:
    for name, (text, value) in _EVERY_POOL_GAUGES.items():
        gauge = GaugeMetricFamily(f"tmemd_pool_{name}", text, labels=["pool"])
        for pool in pools:
            gauge.add_metric([pool.name], value(pool))
        yield gauge
    # Nothing else of a damaged one: a counter that falls to 0 and comes back looks like a burst of events.
    sound = [pool for pool in pools if pool.error is None and not pool.unfinished]
    for name, (text, known) in _POOL_GAUGES.items():
        gauge = GaugeMetricFamily(f"tmemd_pool_{name}", text, labels=["pool"])
        for pool in sound:
            number = known(pool)
            if number is not None:
                gauge.add_metric([pool.name], number)
        yield gauge
    yield _pages(sound)
    for field, text in _POOL_COUNTERS.items():
        counter = CounterMetricFamily(f"tmemd_pool_{field}", text, labels=["pool"])
        for pool in sound:
            counter.add_metric([pool.name], getattr(pool.counters, field))
        yield counter
    yield _requests(sound)
    yield _latencies(sound)


def _pages(pools: Iterable[PoolStatus]) -> Metric:
    gauge = GaugeMetricFamily("tmemd_pool_pages", "Pages of the device, by where they are.", labels=["pool", "place"])
    for pool in pools:
        counters = pool.counters
        for place, pages in (
            ("tmem", counters.pages_in_tmem), ("file", counters.pages_in_file), ("lost", counters.pages_lost),
        ):  # fmt: skip
            gauge.add_metric([pool.name, place], pages)
    return gauge


def _requests(pools: Iterable[PoolStatus]) -> Metric:
    counter = CounterMetricFamily("tmemd_pool_requests", "Requests of the guest.", labels=["pool", "type"])
    for pool in pools:
        counters = pool.counters
        for kind, count in (
            ("read", counters.reads), ("write", counters.writes),
            ("trim", counters.trims), ("flush", counters.flushes),
        ):  # fmt: skip
            counter.add_metric([pool.name, kind], count)
    return counter


def _latencies(pools: Iterable[PoolStatus]) -> Metric:
    family = HistogramMetricFamily(
        "tmemd_pool_operation_seconds",
        "How long page operations took: put and get in tmem, spill and file_read in the backing file.",
        labels=["pool", "op"],
    )
    for pool in pools:
        if pool.latencies:
            for operation in Latencies.__struct_fields__:
                histogram: Histogram = getattr(pool.latencies, operation)
                family.add_metric([pool.name, operation], _buckets(histogram), histogram.sum_ns / 1e9)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, by their upper bounds in seconds."""
    upto = list(accumulate(histogram.counts))
    return [*((f"{LATENCY_BOUNDS_NS[i] / 1e9!r}", upto[i]) for i in _EVERY_OTHER), ("+Inf", upto[-1])]
