# SPDX-License-Identifier: BSD-3-Clause
"""A device that begins on another host fetches the pages ahead that were in RAM on the first, whatever happens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import UUID

import nbd
import pytest

from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until
from tests.support.index import Kind, kinds
from tests.support.remotes import Remote
from tests.support.writers import Ledger, Writers
from tmemd.cli import main
from tmemd.store.check import check_pool
from tmemd.store.requests import Request

PAGES = 2048
HOT = range(600, 1400)
WRITTEN = 512  # pages before this one are written while others are fetched
FAR = 1700  # a page that is in the backing alone
Output = pytest.CaptureFixture[str]


@dataclass
class Hosts:
    """Hosts with pools of their own that reach one backing, on which each page takes 5 ms."""

    serve: Serve
    pools: Path
    list: Path
    backing: str

    def pool(self, host: str) -> Path:
        """The device's, there."""
        return self.pools / host / "web.pool"

    def start(self, host: str, **keys: object) -> Server:
        """Serve it there, or stand by."""
        (self.pools / host).mkdir()
        keys = {"lease": 12, "timeout": 4, "standby": "yes", "prefetch": "no"} | keys
        return self.serve(device("web", self.pools / host, PAGES * PAGE, self.backing, 32 * MIB, **keys))

    def leave(self, host: str, capsys: Output) -> None:
        """Hand it over, and write the list of its pages in RAM there."""
        for command in ("handover", "hot"):
            capsys.readouterr()
            assert main([command, "web", f"--pools={self.pools / host}"]) == 0
        self.list.write_text(capsys.readouterr().out)


@pytest.fixture
def hosts(serve: Serve, pools: Path, tmp_path: Path) -> Iterator[Hosts]:
    delay = ["--filter=delay", "memory", str((PAGES + 512) * PAGE), "rdelay=5ms"]
    with Remote(tmp_path, delay).start() as far:
        yield Hosts(serve, pools, tmp_path / "hot.json", far.uri)


@pytest.fixture
def left(hosts: Hosts, capsys: Output) -> Hosts:
    """One of them has the hot pages in RAM, and is ready to be left."""
    with hosts.start("a").client() as client:
        client.pwrite(compressible(FAR, 1), FAR * PAGE)
        with Control(hosts.pool("a")) as control:
            assert control.request(Request.DRAIN) == 0
        fill(client, HOT)
    hosts.leave("a", capsys)
    return hosts


def fill(client: nbd.NBD, pages: range) -> None:
    """Write them."""
    for page in pages:
        client.pwrite(compressible(page, 1), page * PAGE)


def read(client: nbd.NBD, page: int) -> None:
    """It must be right."""
    assert bytes(client.pread(PAGE, page * PAGE)) == compressible(page, 1)


def test_what_was_in_ram_there_is_in_ram_here(left: Hosts) -> None:
    pool = left.pool("b")
    server = left.start("b", warm=left.list)
    with server.client() as client:
        read(client, FAR)  # by which the device comes
        wait_until(lambda: f"of the {len(HOT)} pages listed were fetched ahead" in server.log(), "the pages")
        assert kinds(pool)[HOT.start : HOT.stop] == [Kind.TMEM] * len(HOT)
        for page in HOT:
            read(client, page)
    now = counters(pool)
    assert (now.prefetches, now.prefetch_hits, now.file_reads) == (len(HOT), len(HOT), 1)
    assert check_pool(pool).problems == []
    server.kill()
    server.start()
    with server.client() as client:
        for page in HOT:
            read(client, page)
    assert counters(pool).prefetches == len(HOT)


@pytest.mark.parametrize(("uuid", "words"), [(str(UUID(int=1)), "the list of another device"), ("?", "is damaged")])
def test_a_list_that_cannot_be_meant_is_not_followed(left: Hosts, uuid: str, words: str) -> None:
    left.list.write_text(json.dumps(json.loads(left.list.read_text()) | {"uuid": uuid}))
    server = left.start("b", warm=left.list)
    with server.client() as client:
        for page in HOT[::20]:
            read(client, page)
    wait_until(lambda: "it begins with nothing in RAM" in server.log(), "the reason")
    assert words in server.log()
    assert counters(left.pool("b")).prefetches == 0


def test_only_as_much_is_fetched_as_there_is_room_and_more_when_there_is(left: Hosts) -> None:
    half = len(HOT) // 2
    made = json.loads(left.list.read_text())
    made["ranges"] = [[HOT.start + half, half], [HOT.start, half]]
    left.list.write_text(json.dumps(made))
    pool = left.pool("b")
    server = left.start("b", warm=left.list)
    with server.client() as client, Control(left.pool("a")) as there, Control(pool) as here:
        least = counters(there.pool).minimum_bytes
        used = counters(there.pool).used_bytes - least
        here.target(least + used * 5 // 8)
        read(client, FAR)
        # Several runs are fetched at a time: one of the others may be there before the last of these.
        wait_until(lambda: kinds(pool)[HOT.start + half : HOT.stop] == [Kind.TMEM] * half, "the hottest pages")
        assert counters(pool).prefetches >= half
        assert counters(pool).used_bytes <= least + used * 5 // 8
        here.target(32 * MIB)
        wait_until(lambda: counters(pool).prefetches == len(HOT), "the others")


@pytest.mark.slow
def test_sigkill_while_a_list_is_fetched_beside_writers(hosts: Hosts, capsys: Output) -> None:
    ledger, others = Ledger(WRITTEN), HOT[::4]
    server = hosts.start("host0")
    for seed, (here, there) in enumerate(itertools.pairwise(f"host{n}" for n in range(6))):
        writers = Writers(ledger, seed, server.connect)
        ledger.wait_for(100, writers.stop)
        writers.finish()
        with server.client() as client:
            fill(client, others)
        hosts.leave(here, capsys)
        server = hosts.start(there, warm=hosts.list)
        writers = Writers(ledger, seed, server.connect)
        ledger.wait_for(1, writers.stop)  # by then the device has come
        wait_until(partial(has_fetched, hosts.pool(there), 20), "pages to be fetched")
        ledger.wait_for(5 * seed, writers.stop)
        server.kill()
        writers.join()
        server.start()
        with server.client() as client:
            ledger.verify(client)
            for page in others:
                read(client, page)
        now = counters(hosts.pool(there))
        assert (now.bad_checksums, now.io_errors, now.pages_lost) == (0, 0, 0)
        assert check_pool(hosts.pool(there)).problems == []


def has_fetched(pool: Path, n: int) -> bool:
    """Whether so many pages were fetched ahead there."""
    return counters(pool).prefetches >= n
