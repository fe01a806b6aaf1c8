# SPDX-License-Identifier: BSD-3-Clause
"""What Prometheus gets: a snapshot of all pools and of the host, as metrics.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): base units, `_total` for
what is only ever counted up. docs/monitoring.md lists them; a test holds that list against this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeAlias, TypeVar

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
from tmemd.store.poolfile import LATENCY_BOUNDS_NS, Doors, Histogram, Latencies, RemoteState

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

_PoolGauges: TypeAlias = Mapping[str, tuple[str, Callable[[PoolStatus], float | None]]]
_EVERY_POOL_GAUGES: Final[_PoolGauges] = {
    "damaged": ("Whether the pool cannot be used.", lambda pool: pool.error is not None),
    "unfinished": ("Whether no plugin has made it a pool yet.", lambda pool: pool.unfinished),
    "taken_bytes": ("RAM that the pool's file takes, as the kernel counts it.", lambda pool: pool.taken_bytes),
}

POOL_GAUGES: Final[_PoolGauges] = {
    "size_bytes": ("Size of the device.", lambda pool: pool.size),
    "target_bytes": ("RAM that the pool may take now.", lambda pool: pool.target_bytes),
    "used_bytes": ("RAM that the pool takes, its index included.", lambda pool: pool.counters.used_bytes),
    "limit_bytes": ("RAM that the device itself takes at most.", lambda pool: pool.counters.limit_bytes),
    "payload_bytes": ("What the pages in tmem take compressed.", lambda pool: pool.counters.payload_bytes),
    "index_bytes": ("RAM that the index takes.", lambda pool: pool.counters.index_bytes),
    "freeable_bytes": ("RAM that demotion could give back.", lambda pool: pool.freeable_bytes),
    "regions_set": ("Regions of the backing file that are not to be trusted if the host dies.",
                    lambda pool: pool.counters.regions_set),
    "map_granules_set": ("The same, by its old name.", lambda pool: pool.counters.regions_set),
    "weight": ("The share that was set for it.", lambda pool: pool.settings.weight),
    "minimum_bytes": ("What its target may not be pushed below.", lambda pool: pool.settings.minimum),
    "cap_bytes": ("What its target may not rise above; absent without a cap.", lambda pool: pool.settings.cap),
    "pinned_target_bytes": ("The target that was set by hand; absent where the policy finds it.",
                            lambda pool: pool.settings.target),
    "compression_enabled": ("Whether pages are compressed.", lambda pool: pool.settings.compression),
    "miss_seconds": ("What a page takes to be read from the file or source, of late; absent where none was.",
                     lambda pool: pool.miss_seconds),
    "frozen": ("Whether puts are refused because it was frozen.", lambda pool: pool.frozen),
    "sync_failed": ("Whether a sync of the backing file failed: nothing is durable until the pool is made anew.",
                    lambda pool: pool.counters.sync_failed != 0),
    "fenced": ("Whether the lease on its backing is over, so that every request fails.",
               lambda pool: pool.counters.is_fenced),
    "prefetching": ("Whether pages are fetched ahead of reads.", lambda pool: pool.counters.prefetching != 0),
    "served": ("Whether a plugin serves the device.", lambda pool: pool.served),
    "never_trims": ("Whether the guest swaps and never says which pages are dead, so that they fill tmem.",
                    lambda pool: pool.never_trims),
}  # fmt: skip

POOL_COUNTERS: Final = {
    "puts": "Pages offered to tmem, refused ones included.",
    "puts_refused": "Pages offered to tmem that it did not take.",
    "puts_zero": "Pages of zeros offered to tmem.",
    "puts_same": "Pages offered to tmem that repeat one word.",
    "puts_raw": "Pages stored in tmem as they are, for they do not compress.",
    "gets": "Pages read from tmem.",
    "file_reads": "Pages read from the backing file, or the source.",
    "invalidates": "Pages in tmem dropped by overwrite, trim or zero.",
    "spills": "Pages written to the backing file because their put was refused.",
    "demotions": "Pages moved from tmem to the backing file; of an ephemeral pool: that just left.",
    "demotion_writes": "Pages that demotion wrote to the backing file.",
    "promotions": "Pages put when they were read from the backing file, or the source.",
    "prefetches": "Pages fetched ahead of reads.",
    "prefetch_hits": "Of these, pages that were read from tmem then.",
    "prefetch_wastes": "Of these, pages that left tmem, or changed, before they were read.",
    "moves": "Records moved by compaction.",
    "bad_checksums": "Pages whose checksum was wrong.",
    "io_errors": "Requests that failed.",
}

_VIRTIO_COUNTERS: Final = {
    "requests": "Requests that came by virtio.",
    "failures": "Of these, those that failed.",
    "kicks": "Wake-ups by the guest.",
    "interrupts": "Interrupts of the guest.",
    "polls": "Times that a queue was watched before sleeping.",
    "polls_won": "Of these, those in which something came.",
}

_REMOTE_COUNTERS: Final = {
    "connects": "Connections made to the server.",
    "losses": "Connections that were lost.",
    "time_outs": "Requests that had no answer in time, and failed.",
    "repeats": "Requests sent again after a loss.",
    "trims": "Pages that were trimmed, which it was told to forget.",
}

HOST_GAUGES: Final[Mapping[str, tuple[str, Callable[[HostStatus], float | None]]]] = {
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
        snapshot = self._snapshot
        yield InfoMetricFamily("tmemd_build", "Which tmemd this is.", {"version": version()})
        if snapshot.host:
            yield from _of_host(snapshot.host)
        if snapshot.ticks:
            yield from _without_creation(snapshot.ticks.collect())
        words = "1 for each thing that keeps tmemd from doing as it was told."
        problems = [((problem.what, problem.words), 1) for problem in snapshot.problems]
        yield _filled(GaugeMetricFamily("tmemd_problem", words, labels=["what", "words"]), problems)
        yield GaugeMetricFamily("tmemd_pools", "Pools there are.", value=len(snapshot.pools))
        yield from _of_pools(snapshot.pools)


_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)


def _filled(family: _Family, values: Iterable[tuple[Sequence[str], float | None]]) -> _Family:
    """With a sample for each value that there is, by its labels."""
    for labels, value in values:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _of_host(host: HostStatus) -> Iterator[Metric]:
    yield InfoMetricFamily("tmemd_policy", "How the budget is shared out.", {"policy": host.policy})
    for name, (text, value) in HOST_GAUGES.items():
        yield _filled(GaugeMetricFamily(f"tmemd_{name}", text, labels=[]), [((), value(host))])
    pressure = GaugeMetricFamily(
        "tmemd_host_memory_pressure_ratio",
        "Share of the time in which some task, and all tasks, waited for memory; absent where the kernel does not say.",
        labels=["kind"],
    )
    yield _filled(pressure, [(("some",), host.pressure_some), (("full",), host.pressure_full)])


def _without_creation(families: Iterable[Metric]) -> Iterator[Metric]:
    """When somebody began to count is of no use, and would be a time series of its own."""
    for family in families:
        family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        yield family


def _of_pools(pools: Sequence[PoolStatus]) -> Iterator[Metric]:
    # Nothing else of a damaged one: a counter that falls to 0 and comes back looks like a burst of events.
    sound = [pool for pool in pools if pool.error is None and not pool.unfinished]
    for gauges, shown in ((_EVERY_POOL_GAUGES, pools), (POOL_GAUGES, sound)):
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"tmemd_pool_{name}", text, labels=["pool"])
            yield _filled(gauge, (((pool.name,), value(pool)) for pool in shown))
    kinds = InfoMetricFamily("tmemd_pool", "Of which kind the pool is, and the source of its pages.", labels=["pool"])
    for pool in sound:
        kinds.add_metric([pool.name], {"kind": pool.kind or "", "source": pool.source})
    yield kinds
    pages = GaugeMetricFamily("tmemd_pool_pages", "Pages of the device, by where they are.", labels=["pool", "place"])
    yield _by_kind(pages, sound, {"tmem": "pages_in_tmem", "file": "pages_in_file", "lost": "pages_lost"})
    for field, text in POOL_COUNTERS.items():
        counter = CounterMetricFamily(f"tmemd_pool_{field}", text, labels=["pool"])
        yield _filled(counter, (((pool.name,), getattr(pool.counters, field)) for pool in sound))
    requests = CounterMetricFamily("tmemd_pool_requests", "Requests of the guest.", labels=["pool", "type"])
    yield _by_kind(requests, sound, {"read": "reads", "write": "writes", "trim": "trims", "flush": "flushes"})
    yield _latencies(sound)
    yield from _of_doors([(pool.name, pool.doors) for pool in sound if pool.doors])
    yield from _of_remotes([(pool.name, pool.remote) for pool in sound if pool.remote and pool.served])


def _of_doors(pools: Sequence[tuple[str, Doors]]) -> Iterator[Metric]:
    """Who came in, and what the virtio door did where it was ever used."""
    connections = GaugeMetricFamily("tmemd_pool_connections", "Connections of clients.", labels=["pool", "door"])
    for name, doors in pools:
        connections.add_metric([name, "nbd"], doors.nbd)
        connections.add_metric([name, "vhost"], doors.vhost)
    yield connections
    used = [(name, doors) for name, doors in pools if doors.vhost or doors.requests]
    for field, text in _VIRTIO_COUNTERS.items():
        counter = CounterMetricFamily(f"tmemd_pool_virtio_{field}", text, labels=["pool"])
        yield _filled(counter, (((name,), getattr(doors, field)) for name, doors in used))
    family = HistogramMetricFamily(
        "tmemd_pool_virtio_request_seconds",
        "How long requests by virtio took, of one in sixteen: from their being found in the queue until the answer.",
        labels=["pool"],
    )
    for name, doors in used:
        family.add_metric([name], _buckets(doors.request), doors.request.sum_ns / 1e9)
    yield family


def _of_remotes(pools: Sequence[tuple[str, RemoteState]]) -> Iterator[Metric]:
    """How the NBD servers are that have devices' files."""
    links = GaugeMetricFamily(
        "tmemd_pool_remote_connections", "Connections to the NBD server that has its file; 0: it is away.",
        labels=["pool"],
    )  # fmt: skip
    yield _filled(links, (((name,), remote.connections) for name, remote in pools))
    overflow = GaugeMetricFamily(
        "tmemd_pool_remote_overflow_pages", "Pages in its overflow file, to be written back to that server.",
        labels=["pool"],
    )  # fmt: skip
    yield _filled(overflow, (((name,), remote.overflow) for name, remote in pools))
    for field, text in _REMOTE_COUNTERS.items():
        counter = CounterMetricFamily(f"tmemd_pool_remote_{field}", text, labels=["pool"])
        yield _filled(counter, (((name,), getattr(remote, field)) for name, remote in pools))


def _by_kind(family: _Family, pools: Iterable[PoolStatus], fields: Mapping[str, str]) -> _Family:
    """With the counters in *fields*, each by its label."""
    return _filled(family, (
        ((pool.name, kind), getattr(pool.counters, field)) for pool in pools for kind, field in fields.items()
    ))  # fmt: skip


def _latencies(pools: Iterable[PoolStatus]) -> Metric:
    family = HistogramMetricFamily(
        "tmemd_pool_operation_seconds",
        "How long page operations took: put and get in tmem, spill and file_read in the file.",
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
