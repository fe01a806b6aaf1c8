# SPDX-License-Identifier: BSD-3-Clause
"""What tmemd may say of a host and a pool."""

from __future__ import annotations

from tests.support import fakes
from tmemd.protocol import HostStatus, PoolStatus
from tmemd.store.poolfile import Doors, Latencies, RemoteState

MIB, GIB = 1 << 20, 1 << 30

HOST = HostStatus(
    policy="fair", budget_bytes=8 * GIB, targets_bytes=6 * GIB, used_bytes=5 * GIB, total_bytes=32 * GIB,
    available_bytes=10 * GIB, reserve_bytes=3 * GIB, pressure_some=0.012, pressure_full=0.0,
    writes_left_bytes=2 * GIB,
)  # fmt: skip


def status(name: str = "web", *, error: str | None = None, put: int = 0, **counters: int) -> PoolStatus:
    """One whose puts took 768 to 1024 ns each."""
    none = fakes.histogram()
    return PoolStatus(
        name=name, path=f"/pools/{name}.pool", uid=0, size=GIB, has_file=True, backing="", target_bytes=64 * MIB,
        frozen=False, served=True, error=error, counters=fakes.counters(**counters),
        latencies=Latencies(fakes.histogram(4, count=put), none, none, none),
        doors=Doors(1, 2, 3000, 4, 500, 600, 700, 80, fakes.histogram(10, count=200)),
        miss_seconds=0.001, remote=RemoteState(1, 4, 6, 2, 0, 3, 0, 7, 5, 1 << 30, 0),
    )  # fmt: skip
