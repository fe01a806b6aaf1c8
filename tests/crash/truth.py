# SPDX-License-Identifier: BSD-3-Clause
"""What each page of a device may be, as its record (crash/recorder.c) is followed."""

from __future__ import annotations

import enum
import errno
import zlib
from collections import Counter, defaultdict
from collections.abc import Set
from dataclasses import dataclass, replace

from tests.crash.history import PAGES, SIZE, Act, Step
from tests.crash.replay import SECTOR, Entry, Operation
from tests.crash.setting import BACKING, OVERFLOW, Setting
from tests.support.content import PAGE
from tmemd.binding import _core

ZEROS = bytes(PAGE)
_KNOWN = frozenset(PAGES)
_WRITERS = {Act.FLUSH, Act.DEMOTE, Act.DRAIN, Act.LOOK_AFTER}  # of what was changed before


def is_written_through(page: int) -> bool:
    """Whether blkid reads it, so that it is never lost (docs/pool-format.md)."""
    from_end = SIZE // PAGE - page
    return page <= 128 or page in (256, 512, 1024) or from_end <= 128 or from_end == 386


class Kind(enum.Enum):
    """What a page turned out to be; all but WRONG are allowed where they are."""

    NEWEST = enum.auto()  # what was acknowledged last, or a change that failed or was under way
    UNFLUSHED = enum.auto()  # older than that, but not than the flush
    TORN = enum.auto()  # sectors of several of these
    LOST = enum.auto()  # EIO, or zeros in its place
    WRONG = enum.auto()


@dataclass(frozen=True)
class Versions:
    """What one page may be."""

    now: frozenset[bytes]  # for a read while the pool lives
    acknowledged: frozenset[bytes]  # the change that was acknowledged last, and what was tried since
    flushed: frozenset[bytes]  # from the last acknowledged FLUSH on
    may_fail: bool = False  # a read may be EIO: a failure was injected that concerns the page

    def changed(self, step: Step, page: int) -> frozenset[bytes]:
        """What *step* may make of it."""
        return frozenset(step.change(page, old) for old in ({ZEROS} if step.covers(page) else self.now))

    def after_success(self, step: Step, page: int) -> Versions:
        """When *step* was acknowledged."""
        new = self.changed(step, page)
        return Versions(new, new, new if step.fua else self.flushed | new)

    def after_attempt(self, step: Step, page: int, *, failed: bool) -> Versions:
        """When *step* *failed*, or its process died."""
        new = self.changed(step, page)
        return Versions(self.now | new, self.acknowledged | new, self.flushed | new, self.may_fail or failed)


class Truth:
    """Follows a record, knowing the steps, and judges each page that is found.

    While the pool lives a page is the newest acknowledged, the whole of it. After host death it is that or, on a
    write-back device that was not drained, lost; on a durable one each sector is from the last acknowledged FLUSH or
    later, and where a server has the file, which forgets without telling, the newest. What was tried and was not
    acknowledged, page by page happened or did not; and pages that an injected failure concerns, or that the server
    forgot, may be EIO; on a cache device they are what its source is after that, as of any disk.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        zeros = frozenset({ZEROS})
        self._pages = dict.fromkeys(PAGES, Versions(zeros, zeros, zeros))
        self._steps: list[Step] = []
        self._step: Step | None = None  # under way
        self._unsynced: defaultdict[str, set[int]] = defaultdict(set)  # pages written in each file
        self._dropped: set[int] = set()  # pages that the server has not on its disk for good, as it was told
        self._away = self._was_away = False  # the server is, or was during the step
        self._faulty = False  # whether anything was made to fail since the host booted
        self._full = False  # this host's disk is
        self._lives = 0
        self._held = 0  # in which of them the server began to hold a change back
        self._late = False  # the next change of its file is that, and of a process that was killed
        self._came_true: list[Entry] = []  # such changes, since the step began
        self._stray: dict[int, bytes] = {}  # what such a change has left in the server's file
        self._drained = False  # and unchanged since
        self._whole = True  # nothing was lost, of which the map would have to tell for ever
        self._reborn: set[int] = set()  # pages that nobody has read since the host died
        self.seen: Counter[Kind] = Counter()  # reads while the pool lived
        self.steps: Counter[tuple[Act, bool]] = Counter()  # and whether they were acknowledged

    def begin(self, steps: list[Step]) -> None:
        """A process is to live these. There is room on the disk."""
        self._steps, self._full = steps, False
        self._lives += 1

    def end(self) -> None:
        """It has ended, whatever it was at."""
        if self._step:
            some_failed = self._step.is_many and (self._faulty or self._full or self._was_away)
            self._attempt(self._step, failed=some_failed)
        self._step = None

    def host_dies(self, *, server_too: bool = True) -> None:
        """The pool is gone: what is found from now on is what the disk has, until a page is found."""
        self._reborn = set(PAGES)
        is_gone = server_too or not self._setting.far
        for file in [BACKING, OVERFLOW] if is_gone else [OVERFLOW]:
            self._unsynced.pop(file, None)
        self._dropped = set() if is_gone else self._dropped
        self._faulty = False

    @property
    def must_look(self) -> bool:
        """Whether there are pages of which nobody knows what the host's death left."""
        return bool(self._reborn)

    def follow(self, entry: Entry) -> None:
        """Go on by one entry of the record. AssertionError when it must not be so."""
        file, pages = entry.path.name, _pages(entry)
        match entry.operation:
            case Operation.MARK:
                self._mark(entry.offset, error=entry.length)
            case Operation.FOUND:
                self._found(entry.offset, entry.data or None)
            case Operation.WRITE | Operation.PUNCH:
                self._change(entry)
            case Operation.HELD | Operation.LATE:
                self._hold(entry.operation)
            case Operation.SYNC:
                self._unsynced.pop(file, None)
            case Operation.SYNC_FAILED:
                self._fault(self._unsynced[file])
                self._dropped |= self._unsynced[file] if file == BACKING else set()
            case Operation.TORN:
                self._fault(pages)
            case Operation.FORGOT:
                self._may_fail(self._unsynced.pop(file, set()))
            case Operation.AWAY | Operation.BACK:
                self._away = entry.operation is Operation.AWAY
                self._was_away |= self._away

    def _change(self, entry: Entry) -> None:
        self._unsynced[entry.path.name] |= _pages(entry)
        if entry.path.name == BACKING:
            self._dropped -= _pages(entry)
            self._stray = {page: data for page, data in self._stray.items() if page not in _pages(entry)}
        if self._late:
            self._late = False
            self._came_true.append(entry)
            self._come_true(entry)

    def _hold(self, operation: Operation) -> None:
        self._late = operation is Operation.LATE and self._held < self._lives
        self._held = self._lives

    def _come_true(self, entry: Entry) -> None:
        """What a process that was killed had asked for is done only now (docs/decisions/0019).

        That is an I/O error as long as anybody knows what the page is.
        """
        for page in _pages(entry):
            old, at = self._pages[page], page * PAGE - entry.offset
            self._stray[page] = entry.data[at : at + PAGE] or ZEROS
            late = {self._stray[page]}
            self._pages[page] = Versions(old.now | late, old.acknowledged | late, old.flushed | late, may_fail=True)

    def _fault(self, pages: Set[int]) -> None:
        self._faulty = True
        self._may_fail(pages)

    def _may_fail(self, pages: Set[int]) -> None:
        for page in pages:
            self._pages[page] = replace(self._pages[page], may_fail=True)

    def _mark(self, number: int, *, error: int) -> None:
        if self._step:
            self._end_step(self._step, error=error)
        self._came_true.clear()
        self._step = self._steps[number] if number < len(self._steps) else None
        act = self._step.act if self._step else None
        self._full |= act is Act.DISK_FULL
        self._lives += act is Act.REATTACH
        self._was_away = self._away
        self._drained &= not (self._step and self._step.changes)

    def _end_step(self, step: Step, *, error: int) -> None:
        self.steps[step.act, not error] += 1
        if error:
            assert self._faulty or self._is_excused(step, error), (
                f"{step.act.name} of pages {step.pages} failed with errno {error}, and nothing was made to fail"
            )
            self._attempt(step, failed=True)
            return
        if step.act is Act.DISK_FREED:
            self._full = False
        if step.act is Act.FLUSH:
            for page, versions in self._pages.items():
                self._pages[page] = replace(versions, flushed=versions.acknowledged)
        if step.act is Act.DRAIN:
            self._drained = self._whole and not (step.changes or self._any_may_fail())
        for page in step.changes:
            self._succeed(step, page)
        for entry in self._came_true:
            self._come_true(entry)

    def _succeed(self, step: Step, page: int) -> None:
        old = self._pages[page]
        may_be_mixed = self._setting.source and old.may_fail and not step.covers(page)
        if may_be_mixed:
            old = replace(old, now=old.now | old.flushed)
        new = replace(old.after_success(step, page), may_fail=may_be_mixed)
        if page in self._stray and new.now == {ZEROS}:  # zeros over what is taken for zeros are no write
            stray = {self._stray[page]}
            new = replace(new, acknowledged=new.acknowledged | stray, flushed=new.flushed | stray)
        self._pages[page] = new

    def _any_may_fail(self) -> bool:
        return any(versions.may_fail for versions in self._pages.values())

    def _is_excused(self, step: Step, error: int) -> bool:
        """Whether it may fail although no operation was made to."""
        if error == errno.EAGAIN and step.act is Act.DRAIN and self._setting.far:
            return True  # the server went and came back again and again meanwhile
        if self._full and (step.changes or step.act in _WRITERS):
            return True
        if self._was_away and not (self._setting.overflow and step.is_whole_write):
            return True
        if step.act is Act.DRAIN:
            return self._any_may_fail()
        # Part of a page that cannot be read cannot be written.
        return any(self._pages[page].may_fail and not step.covers(page) for page in step.changes)

    def _attempt(self, step: Step, *, failed: bool) -> None:
        for page in step.changes:
            self._pages[page] = self._pages[page].after_attempt(step, page, failed=failed)

    def _found(self, page: int, got: bytes | None) -> None:
        versions, is_reborn = self._pages[page], page in self._reborn
        if got is None and self._was_away:
            self.seen[Kind.LOST] += 1
            return
        kind = self.after_death(page, got) if is_reborn else self._while_alive(versions, got)
        self.seen[kind] += 1
        assert kind is not Kind.WRONG, f"page {page} was read as {describe(got)}; {self.allowed(page)}"
        self._reborn.discard(page)
        found = frozenset() if got is None else frozenset({got})
        if is_reborn and self._setting.far and page in self._dropped | self._unsynced[BACKING]:
            # The server's host may die, too.
            may_be = found | versions.acknowledged | versions.flushed
            self._pages[page] = Versions(may_be, may_be, may_be, may_fail=True)
        elif is_reborn:
            self._pages[page] = Versions(found, found, found, may_fail=got is None)
            self._whole &= got is not None
        elif found:
            self._pages[page] = replace(versions, now=found)

    def _while_alive(self, versions: Versions, got: bytes | None) -> Kind:
        if got is None:
            return Kind.LOST if versions.may_fail else Kind.WRONG
        if got in versions.now:
            return Kind.NEWEST
        is_torn = self._setting.source and versions.may_fail and _is_mixed(got, versions.now | versions.flushed)
        return Kind.TORN if is_torn else Kind.WRONG

    def after_death(self, page: int, got: bytes | None) -> Kind:
        """What *page* is, of which *got* (None: EIO) is found if the host dies now."""
        versions = self._pages[page]
        if self._step and page in self._step.changes:
            versions = versions.after_attempt(self._step, page, failed=False)
        is_disk = self._setting.durable or self._setting.source
        in_place = is_disk or is_written_through(page)
        allowed = versions.flushed if is_disk and not self._setting.far else versions.acknowledged
        if got in versions.acknowledged:
            return Kind.NEWEST
        if got in allowed:
            return Kind.UNFLUSHED
        may_be_lost = versions.may_fail or not (in_place or self._drained)
        if may_be_lost and got == (ZEROS if self._setting.lost_zero else None):
            return Kind.LOST
        return Kind.TORN if got and in_place and _is_mixed(got, allowed) else Kind.WRONG

    def allowed(self, page: int) -> str:
        """What *page* may be, for a message."""
        versions = self._pages[page]
        sets = ("now", versions.now), ("acknowledged", versions.acknowledged), ("flushed", versions.flushed)
        text = "; ".join(f"{name}: {', '.join(map(describe, some)) or 'none'}" for name, some in sets)
        under_way = self._step.act.name if self._step else "nothing"
        return f"{text}; {'may' if versions.may_fail else 'must not'} fail; under way: {under_way}"


def _pages(entry: Entry) -> frozenset[int]:
    """Those that it concerns; none if it is about no file that has pages."""
    starts = {BACKING: 0, OVERFLOW: _core.Overflow.file_bytes(SIZE // PAGE) - SIZE}
    if (start := starts.get(entry.path.name)) is None:
        return frozenset()
    at = entry.offset - start
    return _KNOWN.intersection(range(at // PAGE, -(-(at + entry.length) // PAGE)))


def is_of_others(entry: Entry) -> bool:
    """Whether it concerns only pages of which nothing is known."""
    in_pages = entry.operation in (Operation.WRITE, Operation.PUNCH) and entry.offset + entry.length <= SIZE
    return in_pages and entry.path.name == BACKING and not _pages(entry)


def _is_mixed(got: bytes, versions: frozenset[bytes]) -> bool:
    """Whether each sector is that of one of these."""
    return all(any(got[at : at + SECTOR] == one[at : at + SECTOR] for one in versions) for at in range(0, PAGE, SECTOR))


def describe(data: bytes | None) -> str:
    """Page content in a few characters."""
    if data is None:
        return "EIO"
    return f"{data[:16].hex()}/{zlib.crc32(data):08x}" if any(data) else "zeros"
