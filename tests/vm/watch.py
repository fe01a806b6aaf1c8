# SPDX-License-Identifier: BSD-3-Clause
"""Sample a pool from outside until told to stop: one line of JSON for each sample, on standard output."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import msgspec

from tmemd.store import poolfile

INTERVAL_SECONDS = 0.2


class Sample(msgspec.Struct, frozen=True):
    """The pool at one moment. Bytes, but for the pages and the count of trims."""

    at: float  # seconds since the epoch
    allocated: int  # what tmpfs says the pool file takes
    used: int  # what the pool says it takes
    limit: int
    in_tmem: int
    in_file: int
    trims: int
    requests: int  # reads, writes and trims


def sample(fd: int, path: str) -> Sample:
    """Look once."""
    counters = poolfile.read_counters(fd, path)
    return Sample(
        at=time.time(),
        allocated=os.fstat(fd).st_blocks * 512,
        used=counters.used_bytes,
        limit=counters.limit_bytes,
        in_tmem=counters.pages_in_tmem,
        in_file=counters.pages_in_file,
        trims=counters.trims,
        requests=counters.reads + counters.writes + counters.trims,
    )


def main() -> None:
    """Watch the pool file named by the only argument."""
    path = sys.argv[1]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with open(path, "rb", buffering=0) as pool:
        while not stop.wait(INTERVAL_SECONDS):
            print(msgspec.json.encode(sample(pool.fileno(), path)).decode(), flush=True)


if __name__ == "__main__":
    main()
