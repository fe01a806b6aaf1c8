# SPDX-License-Identifier: BSD-3-Clause
"""What the host can spare: MemAvailable, memory pressure (PSI), and the limits of the cgroups that tmemd runs in.

All reads go through *root*, which stands in for / in tests. What a kernel does not have is no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import psutil

from tmemd.store.poolfile import PoolError
from tmemd.system import cgroup

_ROOT: Final = Path("/")
# Of a cgroup's memory.stat: what the kernel can take back without swapping. Version 1 counts descendants apart.
_RECLAIMABLE: Final = {
    "memory.max": ("inactive_file", "active_file", "slab_reclaimable"),
    "memory.limit_in_bytes": ("total_inactive_file", "total_active_file"),
}


class Stalls(msgspec.Struct, frozen=True):
    """For how long tasks have waited for memory, in microseconds since boot (the kernel's accounting/psi.rst)."""

    some_us: int  # at least one did
    full_us: int  # all that could have run did


class Memory(msgspec.Struct, frozen=True):
    """The host's memory, or that of one cgroup with a limit. Sizes in bytes."""

    total: int
    available: int  # without swapping, as MemAvailable
    stalls: Stalls | None  # None: this kernel does not tell


def read_memory(root: Path = _ROOT) -> list[Memory]:
    """The host's memory first, then that of each limited cgroup above this process. Raises PoolError, without /proc."""
    found = [_read_host(root)]
    for limit, usage in cgroup.memory_limits(root):
        group = _read_group(limit, usage, found[0].total)
        if group:
            found.append(group)
    return found


def total_memory() -> int:
    """Bytes of RAM of this host, or of the smallest cgroup that this process runs in. Raises PoolError."""
    return min(memory.total for memory in read_memory())


def _read_host(root: Path) -> Memory:
    try:
        with _procfs(root / "proc"):
            memory = psutil.virtual_memory()
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise PoolError(f"{root / 'proc/meminfo'}: {error}") from None
    return Memory(memory.total, memory.available, _read_stalls(root / "proc/pressure/memory"))


@contextmanager
def _procfs(path: Path) -> Iterator[None]:
    """Where /proc is, psutil knows only by a global of its own. tmemd uses psutil from one thread."""
    before = psutil.PROCFS_PATH
    psutil.PROCFS_PATH = str(path)
    try:
        yield
    finally:
        psutil.PROCFS_PATH = before


def _read_group(limit: Path, usage: Path, host_total: int) -> Memory | None:
    """None where nothing binds. memory.high binds as well: above it every allocation waits (cgroup-v2.rst)."""
    bounds = [_number(limit), _number(limit.with_name("memory.high")) if limit.name == "memory.max" else None]
    total = min((bound for bound in bounds if bound is not None), default=host_total)
    if total >= host_total or (used := _number(usage)) is None:
        return None
    free = max(total - used, 0)
    cache = _reclaimable(limit.with_name("memory.stat"), _RECLAIMABLE[limit.name])
    return Memory(total, min(free + cache, total), _read_stalls(limit.with_name("memory.pressure")))


def _number(path: Path) -> int | None:
    """The number a file holds; None for 'max', for nonsense, and without the file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _reclaimable(path: Path, keys: Sequence[str]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    words = (line.split() for line in lines)
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in keys and word[1].isdigit())


def _read_stalls(path: Path) -> Stalls | None:
    """PSI is missing before Linux 4.20, with psi=0, and (EOPNOTSUPP when read) where it was disabled at boot."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    totals = {}
    for line in lines:
        kind, _, rest = line.partition(" ")
        total = rest.rpartition("total=")[2]
        if total.isdigit():
            totals[kind] = int(total)
    return Stalls(totals["some"], totals["full"]) if {"some", "full"} <= totals.keys() else None
