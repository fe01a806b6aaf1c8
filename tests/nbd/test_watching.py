# SPDX-License-Identifier: BSD-3-Clause
"""What tmemctl top and Prometheus see of a device that serves a client."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.support import fakes
from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, ROOT, Serve, device
from tests.support.scrape import free_port, get, samples, value

PAGES = 1024
OPERATIONS = ("put", "get", "spill", "file_read")


@contextmanager
def watching(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A `tmemctl top --json` that runs."""
    command = [sys.executable, "-m", "tmemd.cli", "top", "--json", "--interval=0.2", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def until_seen(process: subprocess.Popen[str], fields: set[str]) -> dict[str, Any]:
    """The largest that was seen of each of these fields of the only pool, once none of them is 0 or null any more."""
    seen: dict[str, Any] = {}
    assert process.stdout
    for line in itertools.islice(process.stdout, 300):
        for pool in json.loads(line)["pools"]:
            for field in fields:
                number = pool[field]["p99"] if isinstance(pool[field], dict) else pool[field]
                seen[field] = max(seen.get(field, 0), number or 0)
        if all(seen.get(field) for field in fields):
            break
    return seen


def work(client: nbd.NBD) -> None:
    """More than fits into RAM is written; all of it is read."""
    for page in range(PAGES):
        client.pwrite(compressible(page, 1), page * PAGE)
    for page in range(PAGES):
        assert client.pread(PAGE, page * PAGE) == compressible(page, 1)


@pytest.fixture
def tmemd(pools: Path) -> Iterator[tuple[fakes.Tmemd, int]]:
    """A tmemd, and the port where it serves metrics."""
    port = free_port()
    with fakes.tmemd(pools, f"--metrics=127.0.0.1:{port}") as running:
        yield running, port


def test_top_and_metrics_see_what_a_client_does(tmemd: tuple[fakes.Tmemd, int], serve: Serve, disk: Path) -> None:
    running, port = tmemd
    size = PAGES * PAGE
    server = serve(device("web", running.directory, size, disk, MIB, tmemd=running.socket))
    fields = {"puts", "gets", "refusals", "spills", "file_reads", "hit_share", "compression_ratio", "used_bytes"}
    fields |= {f"{operation}_seconds" for operation in OPERATIONS}
    with watching(f"--socket={running.socket}") as top, server.client() as client:
        assert top.stdout
        json.loads(top.stdout.readline())
        work(client)
        seen = until_seen(top, fields)
        found = samples(get(port)[1])
    # An interval may hold reads of one kind only.
    assert 0 < seen["hit_share"] <= 1
    assert seen["compression_ratio"] > 1
    assert 0 < seen["used_bytes"] <= MIB
    counters = server_counters(running)
    for name in ("puts", "puts_refused", "gets", "file_reads", "spills"):
        assert value(found, f"tmemd_pool_{name}_total", pool="web") == getattr(counters, name)
    assert value(found, "tmemd_pool_requests_total", pool="web", type="write") == PAGES
    assert value(found, "tmemd_pool_operation_seconds_count", pool="web", op="get") == counters.gets
    for operation in OPERATIONS:
        seconds = value(found, "tmemd_pool_operation_seconds_sum", pool="web", op=operation)
        assert seconds
        assert 0 < seconds < 60


def server_counters(running: fakes.Tmemd) -> Any:
    """As tmemd tells them now."""
    return running.client.pool("web").counters
