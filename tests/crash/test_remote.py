# SPDX-License-Identifier: BSD-3-Clause
"""A file on an NBD server, in any order of writes, trims, FLUSH, drain and deaths: of the server, of us, of the host.

The server has a volatile cache: when it is killed it forgets what was not flushed. A page is its newest content, or EIO
where something was forgotten or failed; it is never older. Set HISTORIES to try more.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, device, wait_until
from tests.support.remotes import Remote, volatile
from tmemd.store import poolfile
from tmemd.store.requests import Request

SIZE = 96 * MIB
# At both ends of regions of the bitmap, and where pages are written through.
PAGES = [first + n for first in (0, 8192 - 8, 16384 - 8, SIZE // PAGE - 8) for n in range(8)]
STEPS = 120
TIMEOUT = 3.0
HISTORIES = int(os.environ.get("HISTORIES", "2"))


@dataclass
class Page:
    """What a page may be read as."""

    newest: set[bytes] = field(default_factory=lambda: {bytes(PAGE)})  # one, and what was tried since
    may_fail: bool = False  # something was forgotten, or had no answer


class World:
    """A server, a device on it, and what is known of its pages."""

    def __init__(self, serve: Serve, pools: Path, remote: Remote, rng: random.Random, **keys: object) -> None:
        self.remote, self.pool, self.rng = remote, pools / "far.pool", rng
        keys = {"bitmap": remote.run / "map", "timeout": TIMEOUT, "lost": "error"} | keys
        self.durable = keys.get("flush") == "durable"
        self.server: Server = serve(device("far", pools, SIZE, remote.uri, MIB, **keys))
        self.client = self.server.connect()
        self.pages = {page: Page() for page in PAGES}
        self.version = 0
        self.is_up = True
        self.seen: Counter[str] = Counter()

    def write(self) -> None:
        """Some neighbours; where the server is away they may fail."""
        self.version += 1
        at = self.rng.randrange(len(PAGES))
        count = self.rng.randint(1, 8 - at % 8)
        data = [content(page, self.version) for page in PAGES[at : at + count]]
        self._change(PAGES[at : at + count], data, lambda: self.client.pwrite(b"".join(data), PAGES[at] * PAGE))

    def trim(self) -> None:
        at = self.rng.randrange(len(PAGES))
        count = self.rng.randint(1, 8 - at % 8)
        zeros = [bytes(PAGE)] * count
        self._change(PAGES[at : at + count], zeros, lambda: self.client.trim(count * PAGE, PAGES[at] * PAGE))

    def _change(self, pages: list[int], data: list[bytes], request: Callable[[], object]) -> None:
        try:
            request()
            failed = False
        except nbd.Error:
            failed = True
            self.seen["failed"] += 1
        for page, new in zip(pages, data, strict=True):
            known = self.pages[page]
            known.newest = known.newest | {new} if failed else {new}
            known.may_fail = failed

    def check(self, page: int) -> None:
        known = self.pages[page]
        try:
            got = bytes(self.client.pread(PAGE, page * PAGE))
        except nbd.Error:
            self.seen["EIO"] += 1
            assert known.may_fail or not self.is_up, f"page {page} cannot be read"
            return
        self.seen["newest"] += 1
        assert got in known.newest, f"page {page} is old"
        known.newest = {got}

    def read(self) -> None:
        self.check(self.rng.choice(PAGES))

    def flush(self) -> None:
        try:
            self.client.flush()
        except nbd.Error:
            assert not self.is_up

    def drain(self) -> None:
        with Control(self.pool) as control:
            status = control.request(Request.DRAIN)
        assert status == 0 or not self.is_up or any(page.may_fail for page in self.pages.values())

    def server_dies(self) -> None:
        """And forgets, as its host does: what we had not synced may be gone, but what is written through is not."""
        self.remote.kill()
        self.is_up = False
        if not self.durable:
            for page in PAGES:
                self.pages[page].may_fail |= not is_written_through(page)

    def server_comes(self) -> None:
        if self.is_up:
            return
        self.remote.start()
        wait_until(self._is_connected, "the server to be found again")
        self.is_up = True

    def _is_connected(self) -> bool:
        with self.pool.open("rb") as file:
            state = poolfile.Snapshot().take(file.fileno(), self.pool).remote()
        return bool(state.published and state.connections)

    def restart(self, *, host: bool = False) -> None:
        """SIGKILL of our nbdkit, with the pool's death or without."""
        self.server_comes()
        self.server.kill()
        if host:
            self.pool.unlink()
            if not self.durable:
                for page in PAGES:
                    self.pages[page].may_fail |= not is_written_through(page)
        self.server.start()
        self.client = self.server.connect()

    def host_dies(self) -> None:
        self.restart(host=True)


def is_written_through(page: int) -> bool:
    """Whether blkid reads it (docs/pool-format.md)."""
    from_end = SIZE // PAGE - page
    return page <= 128 or from_end <= 128


ACTS = {
    World.write: 50, World.read: 25, World.trim: 6, World.flush: 6, World.drain: 3, World.server_dies: 4,
    World.server_comes: 25, World.restart: 2, World.host_dies: 2,
}  # fmt: skip


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    with volatile(tmp_path / "remote", SIZE) as server:
        yield server.start()


MakeWorld = Callable[[int, str, bool], World]


@pytest.fixture
def make_world(serve: Serve, pools: Path, remote: Remote) -> MakeWorld:
    def make(seed: int, flush: str, overflow: bool) -> World:
        keys = {"overflow": remote.run / "overflow"} if overflow else {}
        return World(serve, pools, remote, random.Random(seed), flush=flush, **keys)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flush", "overflow"), [("none", False), ("none", True), ("durable", False), ("durable", True)]
)
@pytest.mark.parametrize("seed", range(HISTORIES))
def test_a_page_is_its_newest_content_or_an_error(make_world: MakeWorld, seed: int, flush: str, overflow: bool) -> None:
    world = make_world(seed, flush, overflow)
    for _ in range(STEPS):
        act = world.rng.choices(list(ACTS), list(ACTS.values()))[0]
        act(world)
    world.server_comes()
    for page in PAGES:
        world.check(page)
    world.host_dies()
    for page in PAGES:
        world.check(page)
    print(world.seen)
    assert world.seen["newest"] > len(PAGES)
    assert not (overflow and flush == "durable" and world.seen["failed"])
