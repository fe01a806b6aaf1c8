# SPDX-License-Identifier: BSD-3-Clause
"""Writes with verification while the target moves, puts are frozen and thawed, and the device is drained."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until, waiting
from tests.support.leftovers import dying_with_us
from tests.support.writers import Ledger, Writers
from tmemd.store import requests
from tmemd.store.requests import Request

LIMIT = 8 * MIB

Ended = Callable[[], bool]


def wait_for_writes(pool: Path, count: int, ended: Ended) -> None:
    """Return after *count* more write requests, or when the writers have ended."""
    goal = counters(pool).writes + count
    wait_until(lambda: ended() or counters(pool).writes >= goal, "writes")


def change_at_random(pool: Path, times: int, seed: int, ended: Ended) -> None:
    """Change target or frozen state *times* times, draining and demoting in between."""
    rng = random.Random(seed)
    minimum = counters(pool).minimum_bytes
    with Control(pool) as control:
        for step in range(times):
            if rng.random() < 0.6:
                control.target(rng.randint(minimum, LIMIT))
            else:
                control.frozen(rng.random() < 0.5)
            if step % 30 == 29:
                assert control.request(Request.DRAIN) == 0
            if step % 20 == 19:
                assert control.request(Request.DEMOTE, rng.randrange(MIB)) == 0
            # Some traffic between two changes, or they would all fall on the same few requests.
            wait_for_writes(pool, 20, ended)
        control.frozen(False)
        control.target(LIMIT)


def test_no_wrong_page_under_a_verifying_loader(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("control", pools, 4096 * PAGE, disk, LIMIT))
    ledger = Ledger(4096)
    writers = Writers(ledger, 1, server.connect)
    try:
        change_at_random(pools / "control.pool", 400, 1, writers.stop.is_set)
    finally:
        writers.stop.set()
        writers.join()
    assert writers.failed == []
    with server.client() as client:
        ledger.verify(client)
    now = counters(pools / "control.pool")
    assert (now.bad_checksums, now.io_errors) == (0, 0)
    assert min(now.puts_refused, now.spills, now.demotions, now.gets, now.file_reads) > 0


@pytest.mark.parametrize("killed", [False, True], ids=["running", "killed"])
def test_every_request_of_one_moment_is_done(serve: Serve, pools: Path, disk: Path, killed: bool) -> None:
    """The compaction does not take the drain's place, and SIGKILL before any of them was looked at loses none."""
    server = serve(device("queue", pools, 1024 * PAGE, disk, LIMIT))
    pool = pools / "queue.pool"
    with server.client() as client:
        for page in range(1024):
            client.pwrite(content(page, 1) or b"", page * PAGE)
    assert counters(pool).pages_in_tmem > 0
    os.kill(server.pid, signal.SIGSTOP)
    with Control(pool) as control, pool.open("r+b") as file:
        control.frozen(True)
        kinds = Request.DRAIN, Request.COMPACT, Request.DEMOTE
        asked = [requests.ask(file.fileno(), request, MIB) for request in kinds]
        if killed:
            server.kill()
            server.start()
        else:
            os.kill(server.pid, signal.SIGCONT)
        wait_until(lambda: not waiting(file.fileno()), "all requests to be done")
        assert [requests.answer_to(file.fileno(), number) for number in asked] == [0, 0, 0]
    assert counters(pool).pages_in_tmem == 0
    with server.client() as client:
        assert all(client.pread(PAGE, page * PAGE) == content(page, 1) for page in range(1024))


def test_two_who_wait_at_once_each_hear_their_own_answer(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("queue", pools, 1024 * PAGE, disk, LIMIT))
    pool = pools / "queue.pool"
    with server.client() as client:
        for page in range(1024):
            client.pwrite(content(page, 1) or b"", page * PAGE)
    with Control(pool) as control:
        control.frozen(True)
    before = counters(pool).pages_in_tmem
    os.kill(server.pid, signal.SIGSTOP)
    with pool.open("rb") as file, ExitStack() as stack:
        waiters = []
        for number, command in enumerate(("drain", "compact"), 1):
            ctl = [sys.executable, "-m", "tmemd.cli", command, "queue", f"--pools={pools}"]
            waiters.append(subprocess.Popen(dying_with_us(ctl), stdout=subprocess.PIPE, text=True))
            stack.callback(waiters[-1].kill)
            wait_until(lambda number=number: len(waiting(file.fileno())) == number, command)  # type: ignore[misc]
        os.kill(server.pid, signal.SIGCONT)
        said = [waiter.communicate()[0] for waiter in waiters]
    assert [waiter.returncode for waiter in waiters] == [0, 0]
    assert said[0] == f"queue: drained of {before} pages, none is in tmem\n"
    assert "given back" in said[1]


def fio(server: Server, report: Path) -> subprocess.Popen[bytes]:
    """A verifying fio over four connections, running."""
    command = dying_with_us(
        ["fio", "--name=verify", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={server.socket}", "--rw=randwrite",
         "--bs=4k", "--bsrange=4k-64k", "--size=16m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1",
         "--verify_backlog=512", "--buffer_compress_percentage=60", "--loops=20", "--output-format=json",
         f"--output={report}"]
    )  # fmt: skip
    return subprocess.Popen(command, cwd=report.parent)  # fio leaves a file behind


@pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")
def test_no_wrong_page_under_fio(serve: Serve, pools: Path, disk: Path, tmp_path: Path) -> None:
    server = serve(device("fio", pools, "16M", disk, LIMIT))
    with fio(server, tmp_path / "fio.json") as process:
        try:
            change_at_random(pools / "fio.pool", 300, 2, lambda: process.poll() is not None)
            assert process.wait() == 0, (tmp_path / "fio.json").read_text()
        finally:
            process.kill()
    (job,) = json.loads((tmp_path / "fio.json").read_text())["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_kbytes"] >= 16 * 1024
    now = counters(pools / "fio.pool")
    assert (now.bad_checksums, now.io_errors) == (0, 0)
    assert now.spills > 0
