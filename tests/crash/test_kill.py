# SPDX-License-Identifier: BSD-3-Clause
"""SIGKILL of the plugin at random moments: no acknowledged write is lost, and no memory."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.content import PAGE, content
from tests.support.harness import (
    MIB,
    Control,
    Door,
    Serve,
    Server,
    counters,
    device,
    environment,
    nbdkit_command,
    taken,
)
from tests.support.index import Kind, kinds
from tests.support.vhost.disk import Disk, Pending
from tests.support.writers import RUN, Ledger, Writers, pages
from tmemd.store import poolfile, requests
from tmemd.store.poolfile import PoolError
from tmemd.store.requests import Request

PAGES = 2048
CYCLES = 55
both_doors = pytest.mark.parametrize("door", ["nbd", "vhost"])


def disturb(control: Control, limit: int, stop: threading.Event, rng: random.Random) -> None:
    """Change target and frozen state, and ask for demotions, until told to stop; nothing here waits for an answer."""
    minimum = counters(control.pool).minimum_bytes
    with open(control.pool, "r+b") as file:
        while not stop.wait(0.005):
            control.target(rng.randint(minimum, limit))
            control.frozen(rng.random() < 0.2)
            if rng.random() < 0.3:
                with suppress(PoolError):  # as many as there is room for are waiting
                    requests.ask(file.fileno(), rng.choice(list(Request)), rng.randrange(MIB))


def kill_under_writes(server: Server, ledger: Ledger, seed: int, control: Control | None, limit: int) -> None:
    """One cycle: writes, SIGKILL at a moment nobody chose, attach, verify."""
    rng = random.Random(seed)
    writers = Writers(ledger, seed, server.connect)
    noise = threading.Thread(target=disturb, args=(control, limit, writers.stop, rng)) if control else None
    if noise:
        noise.start()
    ledger.wait_for(rng.randrange(1, 60), writers.stop)
    time.sleep(rng.random() * 0.002)  # acknowledgements must not be the only moments to die at
    server.kill()
    writers.join()
    if noise:
        noise.join()
    server.start()
    with server.client() as client:
        ledger.verify(client)


@pytest.fixture
def fresh(serve: Serve, pools: Path, tmp_path: Path) -> Iterator[Server]:
    """A second device of the same size, empty."""
    server = serve(device("fresh", pools, PAGES * PAGE, tmp_path / "fresh", "32M"))
    yield server
    server.kill()


def settled(pool: Path) -> poolfile.Counters:
    """The counters after all the memory that can be given back was given back."""
    with Control(pool) as control:
        assert control.request(Request.COMPACT) == 0
    return counters(pool)


@pytest.mark.slow
@both_doors
def test_invariants_1_and_2_sigkill_loses_no_write_and_no_memory(
    serve: Serve, pools: Path, disk: Path, fresh: Server, door: Door
) -> None:
    server = serve(device("kill", pools, PAGES * PAGE, disk, "32M"), door=door)
    ledger = Ledger(PAGES)
    for cycle in range(CYCLES):
        kill_under_writes(server, ledger, cycle, None, 0)
        now = counters(pools / "kill.pool")
        assert now.bad_checksums == 0
    # A page that is written through may have died between its file and its put; it takes no memory then.
    stored = [kind is Kind.TMEM for kind in kinds(pools / "kill.pool")]
    with server.client() as old, fresh.client() as new:
        for page, data in enumerate(pages(old, PAGES)):
            if stored[page]:
                new.pwrite(data, page * PAGE)
    killed, anew = settled(pools / "kill.pool"), settled(pools / "fresh.pool")
    assert (killed.pages_in_tmem, killed.payload_bytes) == (anew.pages_in_tmem, anew.payload_bytes)
    assert killed.used_bytes == taken(pools / "kill.pool")
    # The slack of a store of size classes: what was overwritten at random packs a tenth worse than what never was.
    assert killed.used_bytes <= 1.1 * anew.used_bytes


@pytest.mark.slow
@both_doors
def test_invariant_1_sigkill_while_pages_are_refused_demoted_and_drained(
    serve: Serve, pools: Path, disk: Path, door: Door
) -> None:
    limit = 4 * MIB
    server = serve(device("kill", pools, PAGES * PAGE, disk, limit), door=door)
    ledger = Ledger(PAGES)
    with Control(pools / "kill.pool") as control:
        for cycle in range(CYCLES):
            kill_under_writes(server, ledger, 1000 + cycle, control, limit)
            now = counters(pools / "kill.pool")
            assert (now.bad_checksums, now.io_errors) == (0, 0)
            assert now.used_bytes <= limit


def send_many(client: Disk, truth: dict[int, bytes], rng: random.Random) -> list[tuple[Pending, bytes]]:
    """Send many requests at once, and change the *truth* of runs as they will; returns what each is to read."""
    sent = []
    for first in rng.sample(sorted(truth), 60):
        what = rng.random()
        if what < 0.2:
            sent.append((client.submit_read(RUN * PAGE, first * PAGE), truth[first]))
        elif what < 0.3:
            truth[first] = bytes(RUN * PAGE)
            sent.append((client.submit_trim(RUN * PAGE, first * PAGE), b""))
        else:
            version = rng.randrange(1, 1 << 30)
            truth[first] = b"".join(content(page, version) for page in range(first, first + RUN))
            sent.append((client.submit_write(truth[first], first * PAGE), b""))
    return sent


@pytest.mark.slow
def test_what_was_under_way_is_completed_when_the_server_is_back(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("kill", pools, PAGES * PAGE, disk, 4 * MIB), door="vhost")
    truth = {first: bytes(RUN * PAGE) for first in range(0, PAGES, RUN)}
    client, left = Disk(server.vhost, queues=4), 0
    for cycle in range(CYCLES):
        rng = random.Random(cycle)
        sent = send_many(client, truth, rng)
        time.sleep(rng.random() * 0.001)
        server.kill()
        left += client.under_way
        server.start()
        client.reconnect()
        for pending, data in sent:
            assert client.wait(pending) == data
        for first, data in truth.items():
            assert client.pread(RUN * PAGE, first * PAGE) == data
    client.shutdown()
    assert left > CYCLES
    now = counters(pools / "kill.pool")
    assert (now.bad_checksums, now.io_errors) == (0, 0)


def test_invariant_1_sigkill_while_attaching(serve: Serve, pools: Path, disk: Path, tmp_path: Path) -> None:
    parameters = device("kill", pools, PAGES * PAGE, disk, "4M")
    server = serve(parameters)
    with server.client() as client:
        for page in range(1, PAGES):
            client.pwrite(content(page, 1), page * PAGE)
    server.kill()
    rng = random.Random(1)
    for _ in range(15):
        command = nbdkit_command(tmp_path / "unused.sock", parameters)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment()) as process:
            time.sleep(rng.random() * 0.3)  # anywhere between exec and the first connection
            process.kill()
        (tmp_path / "unused.sock").unlink(missing_ok=True)
    server.start()
    with server.client() as client:
        assert [n for n, data in enumerate(pages(client, PAGES)) if n and data != content(n, 1)] == []
