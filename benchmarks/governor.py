# SPDX-License-Identifier: BSD-3-Clause
"""What a tick of tmemd's governor costs: CPU time with many pools, every one of them busy.

The pools are real files on tmpfs, whose counters and ages change between any two ticks, as if a plugin served each.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import statistics
import struct
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import fakes
from tmemd.daemonconfig import parse_config
from tmemd.governor.governor import TICK, Governor
from tmemd.settings import PoolSettings
from tmemd.store import poolfile
from tmemd.store.directory import Pools

MIB = 1 << 20


class Load:
    """Pools that change."""

    def __init__(self, directory: Path, pools: int, held: ExitStack) -> None:
        self._fds = [held.enter_context(fakes.pool(directory, f"guest-{n:03}")) for n in range(pools)]
        self._ticks = 0
        for fd in self._fds:
            poolfile.lock(fd)
            os.posix_fallocate(fd, poolfile.COUNTERS_OFFSET, MIB)

    def go_on(self) -> None:
        """What plugins do in half a second."""
        self._ticks += 1
        for n, fd in enumerate(self._fds):
            done = self._ticks * (n + 1)
            used = MIB // 2 + done * 4096 % (MIB // 2)
            fakes.write_counters(fd, fakes.counters(
                used_bytes=used, puts=done * 100, puts_refused=done, gets=done * 90, file_reads=done * 5,
                pages_in_tmem=used // 1400, pages_in_file=4000, index_bytes=4096, demotion_writes=done,
            ))  # fmt: skip
            # A plugin publishes ages once a second: before each other tick.
            words = [(done + i) % 900 for i in range(96)] + [self._ticks // 2, 1 + self._ticks // 10 % 15]
            at = poolfile.STATISTICS_OFFSET + 4 * 48 * 8
            os.pwrite(fd, struct.pack(f"<{len(words)}Q", *words), at)


def cpu() -> float:
    """Seconds of CPU time of this process so far, the kernel's work for it included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(pools: int, ticks: int, policy: str, *, profile: bool) -> dict[str, object]:
    """The cost of each tick."""
    config = parse_config(f'policy = "{policy}"\n[budget]\nmaximum = "{pools}M"\n[demotion]\nwrites_per_hour = "1G"\n')
    with fakes.on_tmpfs() as directory, ExitStack() as held:
        load = Load(directory, pools, held)
        found = Pools(directory, keep=True)
        held.callback(found.close)
        found.adopt_all()
        governor = Governor(found, lambda _: PoolSettings(), config)
        profiler = cProfile.Profile()
        costs = []
        for _ in range(ticks):
            load.go_on()
            time.sleep(TICK / 10)
            before = cpu()
            if profile:
                profiler.runcall(governor.tick)
            else:
                governor.tick()
            costs.append((cpu() - before) * 1000)
        if profile:
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        assert len(governor.samples) == pools
    first, *costs = costs  # which reads identities as well
    ordered = sorted(costs)
    return {
        "pools": pools,
        "policy": policy,
        "ticks": ticks,
        "median_ms": round(statistics.median(costs), 2),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)], 2),
        "worst_ms": round(ordered[-1], 2),
        "first_ms": round(first, 2),
    }


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=int, default=256)
    parser.add_argument("--ticks", type=int, default=100)
    parser.add_argument("--policy", default="fair")
    parser.add_argument("--profile", action="store_true", help="say on standard error where the time goes")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.pools, arguments.ticks, arguments.policy, profile=arguments.profile)
    if arguments.json:
        print(json.dumps(result))
    else:
        print("{pools} pools, policy {policy}: {median_ms} ms of CPU a tick ({p99_ms} p99)".format(**result))


if __name__ == "__main__":
    main()
