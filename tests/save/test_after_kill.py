# SPDX-License-Identifier: BSD-3-Clause
"""A device is saved whose plugin was killed amid writes: what was acknowledged comes back, wherever."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.content import PAGE
from tests.support.harness import MIB, Control, Serve, Server, counters, device
from tests.support.writers import Ledger, Writers
from tmemd.cli import main
from tmemd.store.requests import Request

PAGES = 2048
CYCLES = 10


def die_under_writes(server: Server, pool: Path, ledger: Ledger, seed: int) -> None:
    """Let clients write, have pages demoted and handed over, and kill the server amid it."""
    rng = random.Random(seed)
    writers = Writers(ledger, seed, server.connect)
    ledger.wait_for(rng.randrange(10, 60), writers.stop)
    with Control(pool) as control:
        control.ask(rng.choice([Request.DEMOTE, Request.HANDOVER, Request.HANDBACK, Request.DRAIN]), MIB)
    ledger.wait_for(rng.randrange(1, 40), writers.stop)
    server.kill()
    writers.join()


@pytest.mark.slow
@pytest.mark.parametrize("flush", ["none", "durable"])
def test_what_was_acknowledged_comes_back(serve: Serve, pools: Path, tmp_path: Path, flush: str) -> None:
    disk, pool, file = tmp_path / "disk", pools / "web.pool", tmp_path / "file"
    server = serve(device("web", pools, PAGES * PAGE, disk, 4 * MIB, flush=flush))
    ledger = Ledger(PAGES)
    at = f"--pools={pools}"
    for cycle in range(CYCLES):
        die_under_writes(server, pool, ledger, cycle)
        whole = cycle % 2 == 1
        assert main(["save", *(["--whole"] if whole else []), "web", str(file), at]) == 0
        if whole:  # the next host has nothing of it
            for path in (pool, disk, Path(f"{disk}.map")):
                path.unlink()
            server.start()
            server.kill()
        elif cycle % 4 == 2:  # this host was booted
            pool.unlink()
            server.start()
            server.kill()
        assert main(["restore", "web", str(file), at]) == 0
        assert main(["check", "web", at]) == 0
        server.start()
        with server.client() as client:
            ledger.verify(client)
        now = counters(pool)
        assert (now.pages_lost, now.bad_checksums, now.io_errors) == (0, 0, 0)
