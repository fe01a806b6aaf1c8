# SPDX-License-Identifier: BSD-3-Clause
"""A cache device against the reference: a page is what the source says, whatever becomes of the copies in tmem."""

from __future__ import annotations

import os
import struct
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.model.machine import PAGES, SIZE, Machine, pages_at_borders, spans
from tests.model.rig import CacheRig, writes_end_at
from tests.support import leftovers
from tests.support.content import PAGE, content
from tests.support.harness import KIB, MIB, taken, wait_until
from tests.support.index import GENERATIONS, RECORD_HEADER, Kind, Word, kinds, record_offset, words
from tests.support.reference import Reference
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.check import check_pool
from tmemd.store.poolindex import BLOCK_BYTES

AMPLE = 4 * MIB  # has room for all pages


class Cached(Machine):
    """Every operation of a cache device that is written, and all that may happen to its pool and its source."""

    writable = True
    seen: ClassVar[Counter[str]] = Counter()  # in all histories
    rig: CacheRig

    def _count(self) -> None:
        now = self.rig.counters()
        self.seen.update(
            puts=now.promotions,
            evictions=now.demotions,
            gets=now.gets,
            damages=now.bad_checksums,
            failures=now.io_errors,
        )

    def teardown(self) -> None:
        """As ever; and count what has happened."""
        if hasattr(self, "rig"):
            self._count()
        super().teardown()

    @initialize(room=st.sampled_from([0, 256 * KIB, MIB, AMPLE]), seed=st.integers(0, 3))
    def open(self, room: int, seed: int) -> None:
        """A source with content, and *room* bytes more than the smallest limit."""
        pools = self._exit.enter_context(leftovers.directory("/dev/shm"))
        self.source = self._exit.enter_context(leftovers.directory("/var/tmp")) / "source"
        self.room, self.is_damaged = room, False
        self.reference = Reference(SIZE)
        self._replace(seed)
        self.rig = CacheRig(pools, self.source, _core.layout(SIZE).minimum_bytes + room, write=self.writable)
        self._exit.callback(self.rig.close)

    def _replace(self, seed: int) -> None:
        """Give the source other content, as somebody else would."""
        self.reference.write(0, b"".join(content(page, 1_000_000 * (seed + 1)) for page in range(PAGES))[:SIZE])
        self.source.write_bytes(self.reference.whole())

    @rule(page=pages_at_borders(), count=st.integers(1, 60))
    @precondition(lambda self: self.room == AMPLE)
    def come_to_stay(self, page: int, count: int) -> None:
        """What is read is put when there is room for it."""
        self.rig.frozen(False)
        self.rig.target(self.rig.limit)
        length = min(count * PAGE, SIZE - page * PAGE)

        def are_in_tmem() -> bool:
            self.read((page * PAGE, length))
            return Kind.FILE not in kinds(self.rig.pool)[page : page + count]

        wait_until(are_in_tmem, "pages to be put")
        self.read((page * PAGE, length))

    @rule(span=spans(), at=st.floats(0, 1))
    def fail_to_write(self, span: tuple[int, int], at: float) -> None:
        """A write of which a part reaches the source: its pages are what that says then, the others what they were."""
        if not self.writable:
            return
        offset, length = span
        data = self._data(offset, length)
        first, end = offset // PAGE * PAGE, min(-(-(offset + length) // PAGE) * PAGE, SIZE)
        try:
            with writes_end_at(first + int(at * (end - first)) // 512 * 512):
                self.rig.write(offset, data)
        except OSError:
            event("a write failed")
            with self.source.open("rb") as file:
                self.reference.write(first, os.pread(file.fileno(), end - first, first))
        else:
            self.reference.write(offset, data)

    @rule(pick=st.integers(0, PAGES), at=st.integers(0, RECORD_HEADER + 7), bit=st.integers(0, 7))
    def damage_record(self, pick: int, at: int, bit: int) -> None:
        """A bit of a page's copy changes: it is not what is read."""
        if stored := [page for page, kind in enumerate(kinds(self.rig.pool)) if kind is Kind.TMEM]:
            page = stored[pick % len(stored)]
            where = record_offset(self.rig.pool, page) + at
            byte = os.pread(self.rig.pool_fd, 1, where)[0]
            os.pwrite(self.rig.pool_fd, bytes([byte ^ 1 << bit]), where)
            self.is_damaged = True
            self.read((page * PAGE, min(PAGE, SIZE - page * PAGE)))

    @rule(pages=st.lists(pages_at_borders(), min_size=1, max_size=8), bits=st.integers(1, (1 << 64) - 1))
    def damage_index(self, pages: list[int], bits: int) -> None:
        """Words change while nobody serves the pool."""

        def damage() -> None:
            for page in pages:
                self._damage_word(page, bits)

        self.rig.reattach(damage=damage)

    @rule(pages=st.lists(pages_at_borders(), min_size=1, max_size=8), bit=st.integers(0, 63))
    def damage_bit(self, pages: list[int], bit: int) -> None:
        """The same, of single bits."""
        self.damage_index(pages, 1 << bit)

    def _damage_word(self, page: int, bits: int) -> None:
        word = Word(words(self.rig.pool)[page].value ^ bits)
        if word.value == 0 or self._leads_home(word, page):
            return  # nothing tells these from sound ones
        self.is_damaged = True
        os.pwrite(self.rig.pool_fd, struct.pack("<Q", word.value), self.rig.identity.index_offset + page * 8)

    def _leads_home(self, word: Word, page: int) -> bool:
        """Whether a record of that page, older perhaps, lies where the word leads."""
        found = os.pread(self.rig.pool_fd, 4, self.rig.identity.data_offset + word.location)
        return found == struct.pack("<I", page)

    @rule(state=st.integers(0, 255), block=st.integers(0, PAGES * PAGE // BLOCK_BYTES))
    def damage_state(self, state: int, block: int) -> None:
        """A block's state changes while nobody serves the pool."""
        at = poolfile.STATES_OFFSET + block
        self.rig.reattach(damage=lambda: os.pwrite(self.rig.pool_fd, bytes([state]), at))

    @rule(seed=st.integers(0, 3))
    def be_replaced(self, seed: int) -> None:
        """Somebody else changes the source while nobody serves it, and who serves it next makes a new pool."""
        self._count()
        self.rig.device.close()
        self._replace(seed)
        self.rig.drop_pool()
        self.is_damaged = False

    @rule()
    def reattach(self) -> None:
        """Serve the same pool again: pages in tmem stay there."""
        self.rig.reattach()

    @rule()
    def ages(self) -> None:
        """The published ages tell of every page in tmem, and every page of the source, at its age."""
        wait_until(self._do_ages_agree, "ages to agree with the index")

    def _do_ages_agree(self) -> bool:
        self.rig.device.publish_ages()
        stored, filed = [0] * GENERATIONS, [0] * GENERATIONS
        for word in words(self.rig.pool):
            stored[0] += word.slot if word.kind is Kind.TMEM else 0
            filed[0] += word.kind is Kind.FILE
        found = poolfile.Snapshot().take(self.rig.pool_fd, self.rig.pool).ages()
        return (sum(found.stored_bytes), sum(found.in_file_pages)) == (stored[0], filed[0])

    @rule()
    def drain(self) -> None:
        """Nothing is left in memory."""
        self.rig.device.drain()

    @rule()
    def check(self) -> None:
        """An independent reader of the pool file finds nothing wrong with it, unless it was damaged."""
        wait_until(lambda: self.is_damaged or not check_pool(self.rig.pool).problems, "a pool that is sound")

    @invariant()
    def counters_agree(self) -> None:
        """The counters come to be what the index, read independently, and tmpfs say."""
        if hasattr(self, "rig"):
            wait_until(self._do_counters_agree, "counters to agree with the index")

    def _do_counters_agree(self) -> bool:
        now, index = self.rig.counters(), kinds(self.rig.pool)
        assert now.used_bytes <= now.limit_bytes
        counted = now.pages_in_tmem, now.pages_in_file, now.pages_lost, now.used_bytes
        return counted == (index.count(Kind.TMEM), index.count(Kind.FILE), 0, taken(self.rig.pool))


class ReadOnly(Cached):
    """One that nobody writes."""

    writable = False

    def _change(self, offset: int, data: bytes) -> None:
        pass

    def _zeroed(self, span: tuple[int, int], call: object, *, may_keep: bool) -> None:
        pass


@pytest.mark.parametrize("machine", [Cached, ReadOnly])
def test_a_cache_device_is_what_its_source_is(machine: type[Cached]) -> None:
    machine.seen = Counter()
    happened = {"puts", "evictions", "gets"} | ({"failures"} if machine.writable else set())
    runs = 0
    while runs == 0 or (runs < 5 and not all(machine.seen[what] for what in happened)):
        runs += 1
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=60, stateful_step_count=40, database=None, suppress_health_check=list(HealthCheck)
            ),
        )
    assert {what for what in happened if not machine.seen[what]} == set()
