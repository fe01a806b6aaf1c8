# SPDX-License-Identifier: BSD-3-Clause
"""A state machine of a device and its reference, of which hypothesis makes up the histories."""

from __future__ import annotations

import contextlib

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.model.rig import Rig
from tests.support import leftovers
from tests.support.content import PAGE, content
from tests.support.harness import KIB, MIB, taken
from tests.support.index import GENERATIONS, Kind, kinds, words
from tests.support.reference import Reference
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.check import check_pool

# Two blocks of the index, the second one short, and a last page that is partly beyond the device's end.
PAGES = 540
SIZE = PAGES * PAGE - 1536
MAY_TRIM, FUA, FAST_ZERO = 1, 2, 8
HOLE, ZERO = 1, 2


# Most requests meet in a few pages at the borders, so that they overlap.
def pages_at_borders() -> st.SearchStrategy[int]:
    """Pages, most of them those few."""
    return st.sampled_from([0, 1, 2, 3, 510, 511, 512, 513, PAGES - 2, PAGES - 1]) | st.integers(0, PAGES - 1)


_PAGE = pages_at_borders()
_WITHIN = st.sampled_from([0, 0, 0, 512, 1024, 4095]) | st.integers(0, PAGE - 1)
_LENGTH = st.sampled_from([1, 2, 3, 512, 1024, PAGE, PAGE, 2 * PAGE, 40 * PAGE]) | st.integers(1, 4 * PAGE)


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and length of a request inside the device."""
    offset = min(draw(_PAGE) * PAGE + draw(_WITHIN), SIZE - 1)
    return offset, min(draw(_LENGTH), SIZE - offset)


class Machine(RuleBasedStateMachine):
    """Every operation of a device, in any order; `backing` and `durable` are set by the test that runs it."""

    backing = True
    durable = False

    def __init__(self) -> None:
        super().__init__()
        self._exit = contextlib.ExitStack()
        self.version = 0

    @initialize(room=st.sampled_from([0, 256 * KIB, MIB, 4 * MIB]))
    def open(self, room: int) -> None:
        """A fresh device, with *room* bytes more than the smallest limit."""
        pools = self._exit.enter_context(leftovers.directory("/dev/shm"))
        disk = self._exit.enter_context(leftovers.directory("/var/tmp"))
        limit = _core.layout(SIZE).minimum_bytes + room
        self.rig = Rig(pools, disk / "backing" if self.backing else None, SIZE, limit, durable=self.durable)
        self._exit.callback(self.rig.close)
        self.reference = Reference(SIZE)

    def teardown(self) -> None:
        """Compare all of the device, and remove it."""
        with self._exit:
            if hasattr(self, "reference"):
                assert self.rig.read(0, SIZE) == self.reference.whole()
                self.check()

    def _data(self, offset: int, length: int) -> bytes:
        self.version += 1
        first = offset // PAGE
        pages = b"".join(content(n, self.version) for n in range(first, (offset + length - 1) // PAGE + 1))
        return pages[offset - first * PAGE :][:length]

    def _refused(self, offset: int, data: bytes) -> None:
        """After a failed write each page is old or new; take over what it is."""
        for start in range(offset - offset % PAGE, offset + len(data), PAGE):
            first, end = max(start, offset), min(start + PAGE, offset + len(data))
            new, old = data[first - offset : end - offset], self.reference.read(first, end - first)
            got = self.rig.read(first, end - first)
            assert got in (old, new)
            self.reference.write(first, got)

    def _change(self, offset: int, data: bytes) -> None:
        try:
            self.rig.write(offset, data)
        except OSError:
            assert not self.backing
            self._refused(offset, data)
        else:
            self.reference.write(offset, data)

    @rule(span=spans())
    def write(self, span: tuple[int, int]) -> None:
        """Pages of every kind of content."""
        self._change(span[0], self._data(*span))

    @rule(span=spans(), byte=st.integers(0, 255))
    def fill(self, span: tuple[int, int], byte: int) -> None:
        """One byte over and over: zero and same-filled pages, and pieces of them."""
        self._change(span[0], bytes([byte]) * span[1])

    @rule(page=_PAGE, count=st.integers(50, 300))
    def write_much(self, page: int, count: int) -> None:
        """Enough to meet the limit."""
        offset = page * PAGE
        self._change(offset, self._data(offset, min(count * PAGE, SIZE - offset)))

    @rule(span=spans())
    def read(self, span: tuple[int, int]) -> None:
        """Reads are what was written, now and the next time."""
        expected = self.reference.read(*span)
        assert self.rig.read(*span) == expected
        assert self.rig.read(*span) == expected

    @rule(page=_PAGE, count=st.integers(1, 12))
    def come_back(self, page: int, count: int) -> None:
        """Pages whose put was refused are promoted when they are read and puts are accepted: their content stays."""
        offset = page * PAGE
        length = min(count * PAGE, SIZE - offset)
        if self.backing:
            self.freeze(True)
            self._change(offset, self._data(offset, length))
            self.freeze(False)
        before = self.rig.counters().promotions
        self.read((offset, min(length, 8 * PAGE)))
        event("promoted" if self.rig.counters().promotions > before else "not promoted")

    @rule(page=_PAGE, step=st.sampled_from([1, -1, 3, 8]), count=st.integers(8, 40))
    def read_along(self, page: int, step: int, count: int) -> None:
        """Pages that are fetched ahead are what was written, also those that are written while they are."""
        if not self.backing:
            return
        self._prefetch("yes")
        self.write_much(page, count)
        self.demote(100 * MIB)
        self.freeze(False)
        before = self.rig.counters().prefetch_hits
        for at in range(page, page + count * step, step):
            if 0 <= at < PAGES - 1:
                assert self.rig.read(at * PAGE, PAGE) == self.reference.read(at * PAGE, PAGE)
            if at % 5 == 0 and 0 <= at + 2 * step < PAGES - 1:
                self._change((at + 2 * step) * PAGE, self._data((at + 2 * step) * PAGE, PAGE))
        event("fetched ahead" if self.rig.counters().prefetch_hits > before else "not fetched ahead")
        self._prefetch("no")

    def _prefetch(self, mode: str) -> None:
        """Whoever attaches anew has none of the threads that fetch."""
        self.rig.prefetch = mode
        self.rig.reattach(clean=True)

    @rule(span=spans())
    def trim(self, span: tuple[int, int]) -> None:
        """A trimmed page reads as zeros; at the borders bytes may stay."""
        self._zeroed(span, lambda: _core.trim(self.rig.device, span[1], span[0], 0), may_keep=True)

    @rule(span=spans(), flags=st.sampled_from([0, MAY_TRIM, FAST_ZERO, MAY_TRIM | FUA]))
    def zero(self, span: tuple[int, int], flags: int) -> None:
        """All of it is zeros, or a fast zero was declined."""
        self._zeroed(span, lambda: _core.zero(self.rig.device, span[1], span[0], flags), may_keep=False)

    def _zeroed(self, span: tuple[int, int], call: object, *, may_keep: bool) -> None:
        assert callable(call)
        try:
            call()
        except OSError:
            self._refused(span[0], bytes(span[1]))
            return
        if may_keep:
            self._refused(span[0], bytes(span[1]))
        else:
            self.reference.zero(*span)

    @rule(span=spans())
    def cache(self, span: tuple[int, int]) -> None:
        """A hint; content stays."""
        _core.cache(self.rig.device, span[1], span[0], 0)

    @rule()
    def flush(self) -> None:
        """FLUSH as configured."""
        _core.flush(self.rig.device, 0)

    @rule(share=st.floats(0, 1))
    def target(self, share: float) -> None:
        """Any target between the smallest and the limit."""
        self.rig.target(self.rig.minimum + int(share * (self.rig.limit - self.rig.minimum)))

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        """Refuse puts, or accept them again."""
        self.rig.frozen(frozen)

    @rule(on=st.booleans())
    def compression(self, on: bool) -> None:
        """Compress what is put from now on, or store it as it is."""
        poolfile.write_compression(self.rig.pool_fd, on)

    @rule(moves=st.sampled_from([1, 20, 10_000]))
    def compact(self, moves: int) -> None:
        """Give memory back."""
        self.rig.device.compact(moves)

    @rule(nbytes=st.sampled_from([1, 256 * KIB, 100 * MIB]))
    def demote(self, nbytes: int) -> None:
        """Move the coldest to the file, when there is one."""
        if self.backing:
            self.rig.device.demote(nbytes)

    @rule()
    def drain(self) -> None:
        """Everything to the file: nothing is left in memory, and the map is clean."""
        if self.backing:
            self.rig.device.drain()
            now = self.rig.counters()
            assert (now.pages_in_tmem, now.regions_set) == (0, 0)

    @rule(times=st.sampled_from([1, 1, 7, 16]))
    def age(self, times: int) -> None:
        """Begin the next generations."""
        for _ in range(times):
            self.rig.device.begin_generation()

    @rule()
    def ages(self) -> None:
        """The published ages tell of every page in tmem, and every page of the file, at its age."""
        self.rig.device.publish_ages()
        found = poolfile.Snapshot().take(self.rig.pool_fd, self.rig.pool).ages()
        index = words(self.rig.pool)
        stored, filed = [0] * GENERATIONS, [0] * GENERATIONS
        for word in index:
            age = word.age(found.generation or 1)
            stored[age] += word.slot if word.kind is Kind.TMEM else 0
            filed[age] += word.kind is Kind.FILE
        assert (found.stored_bytes, found.in_file_pages) == (tuple(stored), tuple(filed))

    @rule(clean=st.booleans())
    def reattach(self, clean: bool) -> None:
        """Serve the same pool again: the page counts, rebuilt from the index, are the same."""
        before = self.rig.counters()
        self.rig.reattach(clean=clean)
        after = self.rig.counters()
        assert (after.pages_in_tmem, after.pages_in_file) == (before.pages_in_tmem, before.pages_in_file)
        assert after.payload_bytes == before.payload_bytes

    @rule()
    def check(self) -> None:
        """An independent reader of the pool file finds nothing wrong with it."""
        assert check_pool(self.rig.pool).problems == []

    @rule(span=spans())
    def extents(self, span: tuple[int, int]) -> None:
        """What is called a hole reads as zeros, and the answer leaves nothing out."""
        at = span[0]
        for offset, length, kind in _core.extents(self.rig.device, span[1], span[0], 0):
            assert offset <= at, "a gap in the extents"
            at = max(at, offset + length)
            end = min(offset + length, SIZE)
            if kind & ZERO:
                assert not self.reference.read(offset, end - offset).strip(b"\0")
        assert at >= sum(span)

    @invariant()
    def counters_agree(self) -> None:
        """The counters are what the index, read independently, and tmpfs say."""
        if not hasattr(self, "reference"):
            return
        now, index = self.rig.counters(), kinds(self.rig.pool)
        assert now.pages_in_tmem == sum(kind is Kind.TMEM for kind in index)
        assert now.pages_in_file == sum(kind is Kind.FILE for kind in index)
        assert now.used_bytes == taken(self.rig.pool)
        assert (now.pages_lost, now.bad_checksums, now.io_errors) == (0, 0, 0)
        assert now.used_bytes <= now.limit_bytes
