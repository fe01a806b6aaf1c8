# SPDX-License-Identifier: BSD-3-Clause
"""Memory taken from the host for the same pages: our device against the kernel's own zram."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import peers, trace, zram
from tmemd.store import poolfile

PAGE = 4096
STILL = 3.0  # seconds without any change, after which background work is taken to be done
PATIENCE = 120.0

Figures = dict[str, dict[str, int]]


def pool_bytes(pool: Path) -> dict[str, int]:
    """What a pool says it takes, what tmpfs says, and the compressed bytes in it."""
    fd = os.open(pool, os.O_RDONLY)
    try:
        counters = poolfile.read_counters(fd, pool)
        allocated = os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
    return {"used": counters.used_bytes, "allocated": allocated, "compressed": counters.payload_bytes}


def drained(pool: Path) -> dict[str, int]:
    """The pool's figures once its background work has come to rest by itself."""
    last, since = pool_bytes(pool), time.monotonic()
    deadline = since + PATIENCE
    while time.monotonic() < min(deadline, since + STILL):
        time.sleep(0.2)
        figures = pool_bytes(pool)
        if figures != last:
            last, since = figures, time.monotonic()
    return last


def measure_device(place: peers.Place, rounds: trace.Trace) -> Figures:
    """A device of the corpus's size: fill it, let it rest, overwrite, let it rest, verify."""
    trace_file, pool = place.disk / "trace", place.pools / "bench.pool"
    trace.save(rounds, trace_file)
    peer = peers.ours(place, place.corpus.stat().st_size)
    with peers.serving(peer, place) as server, peers.loading(server, place) as load:
        load("fill", 32)
        figures = {"fresh, not drained": pool_bytes(pool), "fresh": drained(pool)}
        load("replay", 32, trace_file)
        figures |= {"after, not drained": pool_bytes(pool), "after": drained(pool)}
        load("verify", 32)
    return figures


def measure_zram(corpus: Path, rounds: trace.Trace) -> Figures:
    """The same pages in the same order on zram."""
    pages = corpus.stat().st_size // PAGE
    with corpus.open("rb") as file, zram.device(pages * PAGE) as device:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        device.write_all(memory, [(page, page) for page in range(pages)])
        figures = {"fresh, not drained": zram_bytes(device), "fresh": zram_compacted(device)}
        device.write_all(memory, rounds)
        return figures | {"after, not drained": zram_bytes(device), "after": zram_compacted(device)}


def zram_bytes(device: zram.Zram) -> dict[str, int]:
    """What zram takes now."""
    usage = device.usage()
    return {"used": usage.used, "compressed": usage.compressed}


def zram_compacted(device: zram.Zram) -> dict[str, int]:
    """What zram takes once it was told to compact."""
    device.compact()
    return zram_bytes(device)


def measure(place: peers.Place, rounds: int, say: Callable[[str], None]) -> dict[str, Figures]:
    """Both, in the same run; zram is left out, and said to be, where this machine does not let us have one."""
    writes = trace.make(place.corpus.stat().st_size // PAGE, rounds)
    say("density: our device")
    figures = {"tmem": measure_device(place, writes)}
    if not os.access(zram.CONTROL / "hot_add", os.R_OK):
        say("density: no zram here (root and the zram module are needed); nothing to compare with")
        return figures
    say("density: zram")
    return figures | {"zram": measure_zram(place.corpus, writes)}
