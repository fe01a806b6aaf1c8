# SPDX-License-Identifier: BSD-3-Clause
"""Both doors of a device at once, under load: each checks what the other wrote, and the server is killed meanwhile."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.content import PAGE
from tests.support.harness import DEADLINE, MIB, Serve, Server, counters, device, wait_until
from tests.support.load import Load, Option, build, load
from tmemd.store import poolfile

SIZE = 64 * MIB
REQUESTS = 200_000  # by each door
KILLS = 10


def has_changed(file: Path, before: bytes) -> bool:
    return file.read_bytes() != before


def are_both_in(pool: Path) -> bool:
    """Whether a request has come by each door: who is still connecting does not survive a kill."""
    with pool.open("rb") as file:
        snapshot = poolfile.Snapshot().take(file.fileno(), pool)
    known, by_virtio = snapshot.counters(), snapshot.doors().requests
    return 0 < by_virtio < known.reads + known.writes + known.trims


def kill_under_load(server: Server, ledger: Path) -> None:
    """SIGKILL at a moment nobody chose after a page was written, and start again."""
    before = ledger.read_bytes()
    wait_until(partial(has_changed, ledger, before), "a write")
    time.sleep(time.monotonic_ns() % 20 / 1000)
    server.kill()
    server.start()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [0, KILLS])
def test_no_page_is_wrong_by_either_door(serve: Serve, pools: Path, disk: Path, tmp_path: Path, kills: int) -> None:
    build()
    # A quarter of the pages has to be in the file.
    parameters = device("both", pools, SIZE, disk, 12 * MIB, clients="any")
    server, ledger = serve(parameters, door="vhost"), tmp_path / "ledger"
    known: dict[str, Option] = {"mix": "4:5:1", "verify": ledger, "reconnect": DEADLINE, "depth": 32}
    with (
        Load("nbd", server.socket, seed=1, count=REQUESTS, **known) as one,
        Load("vhost", server.vhost, seed=2, count=REQUESTS, queues=4, **known) as other,
    ):
        wait_until(partial(are_both_in, pools / "both.pool"), "both to be served")
        for _ in range(kills):
            kill_under_load(server, ledger)
        for report in (one.report(), other.report()):
            assert (report.requests, report.failed, report.wrong) == (REQUESTS, 0, 0)
            # A server that died before one of them had come back to it did not die for that one.
            assert bool(report.returns) == bool(kills)
    assert counters(pools / "both.pool").pages_in_file
    for report in (
        load("nbd", server.socket, verify=ledger, sequential=True, count=SIZE // PAGE, depth=16),
        load("vhost", server.vhost, verify=ledger, sequential=True, count=SIZE // PAGE, depth=16),
    ):
        assert (report.failed, report.wrong) == (0, 0)
