# SPDX-License-Identifier: BSD-3-Clause
"""A disk that does not answer holds up the requests that need it, and no others; nothing is stale once it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import nbd
import pytest

from tests.support.content import PAGE, compressible, incompressible
from tests.support.gate import Gate
from tests.support.harness import MIB, Control, Serve, Server, counters, device, taken, wait_until
from tests.support.writers import pages as read_pages
from tmemd.store.requests import Choice, Request

SIZE: Final = 64 * MIB
BLOCK: Final = 512  # pages that one thread of a demotion looks through
RUN: Final = 64  # pages that it writes at once
THREADS: Final = 8  # of a demotion

# One run in each of eight blocks cannot be compressed and is what is demoted; all other pages of these blocks stay in
# RAM. Pages whose numbers are equal modulo 1024 may share locks: no two runs do, and together they have half of them.
BLOCKS: Final = range(4, 4 + THREADS)
DEMOTED: Final = [block * BLOCK + RUN * nth + n for nth, block in enumerate(BLOCKS) for n in range(RUN)]
IN_RAM: Final = sorted(set(range(4 * BLOCK, 12 * BLOCK)) - set(DEMOTED))
FILED: Final = range(12 * BLOCK, 13 * BLOCK)
# What is written while puts are refused: none of them shares locks with what is demoted.
SPILLED: Final = [block * BLOCK + at for block in (14, 15) for at in range(RUN * (15 - block), BLOCK, 2 * RUN)]
SPILLED_PAGES: Final = 8  # at each of these
# In blocks that have an index and in blocks that have none, where the write-intent map is set already; whatever locks
# there are, some of these pages share them with what hangs.
NEW: Final = [*range(13 * BLOCK, 14 * BLOCK), *range(18 * BLOCK, 20 * BLOCK)]
NOWHERE: Final = [*range(17 * BLOCK + 1, 18 * BLOCK), *range(20 * BLOCK, 22 * BLOCK)]
MARKING: Final = 17 * BLOCK  # a page there sets the map for its region


class Requests:
    """Many requests at once over a connection of their own, and what their pages are afterwards."""

    def __init__(self, server: Server, expected: dict[int, bytes]) -> None:
        self._handle = server.connect()
        self._expected = expected
        self._cookies: list[int] = []
        self._reads: list[tuple[int, nbd.Buffer]] = []

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write within one page, or whole pages."""
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        self._cookies.append(self._handle.aio_pwrite(buffer, offset, flags=flags))
        for at in range(0, len(data), PAGE):
            page, within = divmod(offset + at, PAGE)
            old, new = self._expected.get(page, bytes(PAGE)), data[at : at + PAGE]
            self._expected[page] = old[:within] + new + old[within + len(new) :]

    def put(self, pages: Iterable[int], version: int, flags: int = 0) -> None:
        """Write these pages, each by itself."""
        for page in pages:
            self.write(page * PAGE, compressible(page, version), flags)

    def trim(self, page: int, n: int = 1) -> None:
        """Trim n pages."""
        self._cookies.append(self._handle.aio_trim(n * PAGE, page * PAGE))
        self._expected.update(dict.fromkeys(range(page, page + n), bytes(PAGE)))

    def get(self, pages: Iterable[int]) -> None:
        """Read these pages, each by itself."""
        for page in pages:
            buffer = nbd.Buffer(PAGE)
            self._cookies.append(self._handle.aio_pread(buffer, page * PAGE))
            self._reads.append((page, buffer))

    def flush(self) -> None:
        """FLUSH."""
        self._cookies.append(self._handle.aio_flush())

    def finish(self, what: str) -> None:
        """Wait for the answers; AssertionError when one does not come or is an error, or a page read is wrong."""

        def answered() -> bool:
            while self._handle.aio_in_flight() and self._handle.poll(1):
                pass
            return not self._handle.aio_in_flight()

        wait_until(answered, what)
        assert all(self._handle.aio_command_completed(cookie) for cookie in self._cookies)
        wrong = [page for page, got in self._reads if got.to_bytearray() != self._expected.get(page, bytes(PAGE))]
        assert wrong == []
        self._cookies, self._reads = [], []


class Stuck:
    """A device that was given its pages, and whose disk can be made to hang."""

    def __init__(self, serve: Serve, pools: Path, disk: Path, tmp_path: Path, **keys: str) -> None:
        self.gate = Gate(tmp_path, disk)
        parameters = device("slow", pools, SIZE, disk, 32 * MIB, watermark=0, **keys)
        self.server = serve(parameters, options=("--threads", "32"), wrapper=self.gate.wrapper)
        self.pool = pools / "slow.pool"
        self.expected: dict[int, bytes] = {}
        self.requests = self.another()

    def another(self) -> Requests:
        """Requests over another connection."""
        return Requests(self.server, self.expected)

    def fill(self, control: Control) -> None:
        """Write all pages, and move those that are to be in the file there."""
        for page in (*FILED, MARKING):
            self.requests.write(page * PAGE, incompressible(page, 1))
        self.requests.finish("pages to be written")
        self.demote(control)
        assert counters(self.pool).pages_in_tmem == 0
        self.requests.put(IN_RAM, 1)
        for page in DEMOTED:
            self.requests.write(page * PAGE, incompressible(page, 1))
        self.requests.finish("pages to be written")
        assert counters(self.pool).pages_in_tmem == len(IN_RAM) + len(DEMOTED)

    def demote(self, control: Control) -> None:
        """Move what cannot be compressed to the file."""
        assert control.request(Request.DEMOTE, SIZE, Choice(raw_only=True)) == 0

    def hang(self, control: Control) -> tuple[int, list[Requests]]:
        """Let eight threads of a demotion and as many writers whose puts are refused wait at the closed gate.

        Returns the demotion's number, and the writers.
        """
        writers = [self.another() for _ in SPILLED]
        demotion = control.ask(Request.DEMOTE, SIZE, Choice(raw_only=True))
        self.gate.wait_for(THREADS, "all threads of a demotion to hang")
        control.frozen(True)
        for writer, first in zip(writers, SPILLED, strict=True):
            data = b"".join(compressible(page, 1) for page in range(first, first + SPILLED_PAGES))
            writer.write(first * PAGE, data)
        self.gate.wait_for(THREADS + len(SPILLED), "all writers to hang")
        control.frozen(False)
        return demotion, writers

    @contextmanager
    def hanging(self, control: Control) -> Iterator[None]:
        """They hang for the length of a with block; then the disk answers again, and they end."""
        with self.gate.closed():
            demotion, writers = self.hang(control)
            yield
            assert not control.answered(demotion), "the gate has a gap"
            assert len(self.gate.calls()) == THREADS + len(SPILLED), "somebody else needed the disk"
        for writer in writers:
            writer.finish("writers to end")
        wait_until(lambda: control.answered(demotion), "the demotion to end")

    def verify(self) -> None:
        """Every page of the device is as it was acknowledged."""
        with self.server.client() as client:
            found = enumerate(read_pages(client, SIZE // PAGE))
            assert [page for page, data in found if data != self.expected.get(page, bytes(PAGE))] == []

    def verify_in_ram_and_on_disk(self, control: Control) -> None:
        """The same, then after everything was moved to the file, and after SIGKILL."""
        self.verify()
        assert control.request(Request.DRAIN) == 0
        self.verify()
        self.server.kill()
        self.server.start()
        self.verify()


@pytest.fixture
def make(serve: Serve, pools: Path, disk: Path, tmp_path: Path) -> Callable[..., Stuck]:
    """make(KEY=VALUE...) returns a device with these parameters besides the usual."""
    return lambda **keys: Stuck(serve, pools, disk, tmp_path, **keys)


def gets(stuck: Stuck) -> None:
    stuck.requests.get([*IN_RAM, *DEMOTED])


def puts(stuck: Stuck) -> None:
    stuck.requests.put(IN_RAM, 2)


def gets_of_nowhere(stuck: Stuck) -> None:
    stuck.requests.get(NOWHERE)


def trims(stuck: Stuck) -> None:
    for page in IN_RAM:
        stuck.requests.trim(page)


def trim_of_a_block_that_is_demoted(stuck: Stuck) -> None:
    for block in BLOCKS:
        stuck.requests.trim(block * BLOCK, BLOCK)


def trims_of_filed_pages(stuck: Stuck) -> None:
    stuck.requests.trim(FILED[0], len(FILED) // 2)


def puts_of_new_pages(stuck: Stuck) -> None:
    stuck.requests.put(NEW, 1)


def puts_over_pages_that_are_demoted(stuck: Stuck) -> None:
    stuck.requests.put(DEMOTED, 2)


def puts_over_filed_pages(stuck: Stuck) -> None:
    stuck.requests.put(FILED, 2)


def parts_of_pages_that_are_demoted(stuck: Stuck) -> None:
    for page in (*DEMOTED, *IN_RAM):
        stuck.requests.write(page * PAGE + 512, compressible(page, 2)[:512])


def trims_of_pages_that_are_demoted(stuck: Stuck) -> None:
    for page in DEMOTED:
        stuck.requests.trim(page)


def flushes(stuck: Stuck) -> None:
    stuck.requests.flush()
    stuck.requests.put(IN_RAM[:64], 2, nbd.CMD_FLAG_FUA)


NEED_NO_DISK: Final[Sequence[Callable[[Stuck], None]]] = (
    gets,
    puts,
    gets_of_nowhere,
    trims,
    trim_of_a_block_that_is_demoted,
    trims_of_filed_pages,
    puts_of_new_pages,
    puts_over_pages_that_are_demoted,
    puts_over_filed_pages,
    parts_of_pages_that_are_demoted,
    trims_of_pages_that_are_demoted,
    flushes,
)


@pytest.mark.parametrize("ask", NEED_NO_DISK, ids=lambda ask: ask.__name__)
def test_what_needs_no_disk_does_not_wait_for_one(make: Callable[..., Stuck], ask: Callable[[Stuck], None]) -> None:
    stuck = make()
    with Control(stuck.pool) as control:
        stuck.fill(control)
        with stuck.hanging(control):
            ask(stuck)
            stuck.requests.finish(ask.__name__)
            stuck.requests.get([*IN_RAM, *DEMOTED])
            stuck.requests.finish("reads afterwards")
        stuck.verify_in_ram_and_on_disk(control)


CHANGES_OF_DEMOTED: Final = (
    gets,
    puts_over_pages_that_are_demoted,
    parts_of_pages_that_are_demoted,
    trims_of_pages_that_are_demoted,
)


@pytest.mark.parametrize("ask", CHANGES_OF_DEMOTED, ids=lambda ask: ask.__name__)
def test_sigkill_while_the_disk_hangs_loses_nothing(make: Callable[..., Stuck], ask: Callable[[Stuck], None]) -> None:
    stuck = make()
    with Control(stuck.pool) as control:
        stuck.fill(control)
        with stuck.gate.closed():
            stuck.hang(control)
            ask(stuck)
            stuck.requests.finish(ask.__name__)
            stuck.server.kill()
        stuck.server.start()
        with stuck.server.client() as client:
            for page in (first + n for first in SPILLED for n in range(SPILLED_PAGES)):  # these were not acknowledged
                found = bytes(client.pread(PAGE, page * PAGE))
                assert found in (bytes(PAGE), stuck.expected[page])
                stuck.expected[page] = found
        stuck.verify_in_ram_and_on_disk(control)


@pytest.mark.parametrize("ask", [gets, gets_of_nowhere, trims], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("call", ["pwrite", "fallocate"])
def test_what_needs_no_disk_does_not_wait_for_a_drain(
    make: Callable[..., Stuck], ask: Callable[[Stuck], None], call: str
) -> None:
    stuck = make()
    with Control(stuck.pool) as control:
        stuck.fill(control)
        stuck.requests.trim(FILED[0], len(FILED))  # a whole block of zeros, which the file is yet to hold
        stuck.requests.finish("a trim")
        with stuck.gate.closed(call):
            drain = control.ask(Request.DRAIN)
            stuck.gate.wait_for(1, "the drain to hang")
            ask(stuck)
            stuck.requests.finish(ask.__name__)
            assert not control.answered(drain), "the gate has a gap"
        wait_until(lambda: control.answered(drain), "the drain to end")
        stuck.verify_in_ram_and_on_disk(control)


def test_memory_returns_once_the_disk_answers(make: Callable[..., Stuck]) -> None:
    stuck = make()
    with Control(stuck.pool) as control:
        stuck.fill(control)
        with stuck.gate.closed():
            control.target(2 * MIB)
            stuck.gate.wait_for(1, "a demotion")
            stuck.requests.get([*IN_RAM, *DEMOTED])
            stuck.requests.finish("reads")
        wait_until(lambda: taken(stuck.pool) <= 2 * MIB, "memory to return")
        stuck.verify()


def test_a_durable_device_gives_memory_back_without_its_disk(make: Callable[..., Stuck]) -> None:
    stuck = make(flush="durable")
    stuck.requests.put(IN_RAM, 1)
    stuck.requests.finish("writes")
    with Control(stuck.pool) as control:
        with stuck.gate.closed():
            control.target(2 * MIB)
            wait_until(lambda: taken(stuck.pool) <= 2 * MIB, "memory to return")
            assert stuck.gate.calls() == []
        stuck.verify()


def test_memory_returns_during_a_flush(make: Callable[..., Stuck]) -> None:
    stuck = make(flush="durable")
    stuck.requests.put(IN_RAM, 1)
    stuck.requests.finish("writes")
    with Control(stuck.pool) as control:
        flushing = stuck.another()
        with stuck.gate.closed("fdatasync"):
            flushing.flush()
            stuck.gate.wait_for(1, "the flush")
            control.target(2 * MIB)
            wait_until(lambda: taken(stuck.pool) <= 2 * MIB, "memory to return")
        flushing.finish("the flush")
        stuck.verify()


def test_fua_writes_its_own_page_alone(make: Callable[..., Stuck]) -> None:
    stuck = make(flush="durable")
    stuck.requests.put(IN_RAM, 1)
    stuck.requests.finish("writes")
    with stuck.gate.closed("nothing"):
        stuck.requests.put(NEW[:1], 1, nbd.CMD_FLAG_FUA)
        stuck.requests.finish("a FUA write")
        assert [(call.offset, call.length) for call in stuck.gate.calls("pwrite")] == [(NEW[0] * PAGE, PAGE)]
        assert len(stuck.gate.calls("fdatasync")) == 1


def test_fua_does_not_wait_for_writers_and_demotions(make: Callable[..., Stuck]) -> None:
    stuck = make(flush="durable")
    with Control(stuck.pool) as control:
        stuck.requests.put(IN_RAM, 1)
        stuck.requests.finish("writes")
        writers = [stuck.another() for _ in SPILLED]
        with stuck.gate.closed(f"pwrite {SPILLED[0] * PAGE} {(SPILLED[-1] + SPILLED_PAGES) * PAGE}"):
            control.frozen(True)
            for writer, first in zip(writers, SPILLED, strict=True):
                writer.put(range(first, first + 1), 1)
            stuck.gate.wait_for(len(SPILLED), "all writers to hang")
            control.target(2 * MIB)
            stuck.requests.put(NEW[:1], 1, nbd.CMD_FLAG_FUA)
            stuck.requests.flush()
            stuck.requests.finish("a FUA write and a FLUSH")
        for writer in writers:
            writer.finish("writers to end")
        control.frozen(False)
        stuck.verify()


def test_flushes_that_wait_share_one_sync(make: Callable[..., Stuck]) -> None:
    stuck = make(flush="durable")
    stuck.requests.put(IN_RAM[:8], 1)
    stuck.requests.finish("writes")
    flushing = 16
    with stuck.gate.closed("fdatasync"):
        for _ in range(flushing):
            stuck.requests.flush()
        wait_until(lambda: counters(stuck.pool).flushes == flushing, "all flushes to have begun")
        stuck.gate.open()
        stuck.requests.finish("flushes")
    # The first, and one for all others; and one more for who had begun, but was not yet waiting.
    assert 1 <= len(stuck.gate.calls("fdatasync")) <= 3


@pytest.mark.parametrize("keys", [{}, {"flush": "durable"}], ids=["write-back", "durable"])
@pytest.mark.parametrize(("old", "new"), [("data", "data"), ("data", "zeros"), ("zeros", "data")])
def test_a_write_through_that_was_killed_does_not_come_back_when_the_host_dies(
    make: Callable[..., Stuck], keys: dict[str, str], old: str, new: str
) -> None:
    stuck = make(**keys)
    if old == "data":
        stuck.requests.put(range(2), 1)
        stuck.requests.finish("writes")
    killed = stuck.another()
    with stuck.gate.closed("done"):
        if new == "data":
            killed.write(0, compressible(0, 2) + compressible(1, 2))
        else:
            killed.trim(0, 2)
        stuck.gate.wait_for(1, "the file to be written")
        stuck.server.kill()

    def found() -> list[bytes]:
        stuck.server.start()
        with stuck.server.client() as client:
            pages = [bytes(client.pread(PAGE, page * PAGE)) for page in range(2)]
        stuck.server.kill()
        return pages

    assert found() == [compressible(page, 1) if old == "data" else bytes(PAGE) for page in range(2)]
    before = found()
    stuck.pool.unlink()  # as the host's death does
    assert found() == before
