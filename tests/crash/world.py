# SPDX-License-Identifier: BSD-3-Clause
"""A host with a disk and one device, or two of which one has the disk; their lives and deaths are judged."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

from tests.crash import replay
from tests.crash.far import FarHost
from tests.crash.history import PAGES, SIZE, Step, server_faults
from tests.crash.life import FAILED_TO_OPEN, Birth, open_life, read_pages
from tests.crash.nursery import nursery, recorder
from tests.crash.record import recording
from tests.crash.replay import SECTOR, Disk, Entry, File, Operation
from tests.crash.setting import BACKING, OVERFLOW, Setting
from tests.crash.truth import Kind, Truth, describe, is_of_others
from tests.support.remotes import Remote

_NOT_JUDGED = {Operation.FOUND, Operation.SENT, Operation.HELD, Operation.LATE}


def _reserved(path: Path, file: File) -> range:
    """Bytes of a file that have blocks once it is made: all but the pages."""
    pages = {BACKING: range(SIZE), OVERFLOW: range(file.size - SIZE, file.size)}.get(path.name, range(0))
    reserved = range(pages.start) if pages.start else range(pages.stop, file.size)
    return reserved if any(sector * SECTOR in reserved for sector in file.sectors) else range(0)


class World:
    """Processes live a device one after the other, each a part of a history, on one disk and one boot of the host.

    After each operation on the disk the host may die: what any *samples* of the outcomes leave is judged on a host that
    has booted anew, without changing this one; less than 1: after so many of the operations. A server that has the file
    dies with it, or not.
    """

    def __init__(self, base: Path, seed: int, setting: Setting | None = None, *, samples: float = 1) -> None:
        self.rng = random.Random(seed)
        self.setting = setting or Setting()
        self.truth = Truth(self.setting)
        self.found: Counter[Kind] = Counter()  # pages after the host's death
        self.entries: list[Entry] = []  # of the life lived last
        self.ends: Counter[int] = Counter()  # the processes' exit statuses
        self.failures = False  # whether a server may fail what it is asked for
        self._samples = samples
        self._base, self._files, self._pools = base, base / "files", base / "pools"
        self._afterlife, self._record, self._backing = base / "afterlife", base / "record", self._files / BACKING
        for path in (self._files, self._pools, self._afterlife):
            path.mkdir()
        self._recording = partial(recording, recorder(), self._files, self._record)
        self._boot = uuid.uuid4()
        self._disk = Disk(self.rng)
        self._full = base / "full"  # is there while there is no room on this host's disk
        self._born = False
        self._unsynced: set[Path] = set()
        self._far: FarHost | None = None
        self._after: Remote | None = None  # a server for who boots anew
        if self.setting.length:
            self._disk = Disk(self.rng, {self._backing: File(self.setting.length)})
            self._write(self._disk.evicted())
        if self.setting.far:
            self._begin_far(base)

    def _begin_far(self, base: Path) -> None:
        away = base / "far/away"
        server = partial(self._recording, away=away, threads=True)
        self._recording = partial(self._recording, away=away)
        self._far = FarHost(base / "far", self._backing, self._record, self.rng, server, fua=self.setting.fua)
        self._far.forget = self._forget
        (base / "after").mkdir()
        (self._afterlife / BACKING).touch()
        self._after = Remote(base / "after", ["file", str(self._afterlife / BACKING)]).start()

    @property
    def pool(self) -> Path:
        """The pool file, while the host lives."""
        return self._pools / "life.pool"

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers."""
        if self._far and self._after:
            self._far.kill()
            self._after.kill()

    def live(
        self, steps: list[Step], faults: str = "", *, look: bool = False, of_server: str | None = None
    ) -> list[Step]:
        """A process lives *steps* until *faults* (crash/recorder.c) kill it; returns the steps after that.

        *of_server*: the faults of a server; None: some, unless it is looked at what is left.
        It reads all pages first when told to *look*, or when nobody has since the host's death.
        """
        self._record.touch()
        self._full.unlink(missing_ok=True)
        if self._far:
            self._far.failures = self.failures
            is_calm = self.truth.must_look or not self._born
            some = "" if is_calm else server_faults(self.rng, failures=self.failures)
            self._far.start_anew(some if of_server is None else of_server)
        status = self._run(steps, faults, look=look or self.truth.must_look)
        self.entries = replay.read(self._record)
        os.truncate(self._record, 0)  # a server has it open
        self.truth.begin(steps)
        for entry in self.entries:
            self._follow(entry)
        self.truth.end()
        self._check_end(status, faults)
        done = sum(entry.operation is Operation.MARK for entry in self.entries)
        return steps[done:]

    def _run(self, steps: list[Step], faults: str, *, look: bool) -> int:
        """Returns the exit status of the process; nothing that it began is under way any more."""
        uri = self._far.uri if self._far else ""
        birth = Birth(self.setting, self._files, self._pools, self._boot, uri, self._full, look, steps)
        ours, theirs = multiprocessing.Pipe()
        with ours:
            with theirs:
                nursery().begin(birth, theirs, self._recording(faults, full=self._full))
            if self._far:
                self._far.attend(ours, nursery().kill)
            status = nursery().wait()
        if self._far:
            self._far.settle()
        return status

    def _check_end(self, status: int, faults: str) -> None:
        allowed = {0}
        failures = {Operation.TORN, Operation.SYNC_FAILED}
        if self._far or failures & {entry.operation for entry in self.entries}:
            allowed.add(FAILED_TO_OPEN)
        if set(faults) & set("abs") or (self._far and self._far.has_killed):
            allowed.add(-signal.SIGKILL)
        self.ends[status] += 1
        assert status in allowed, f"the process ended with status {status}"

    def _follow(self, entry: Entry) -> None:
        if not is_of_others(entry):
            self._disk.step(entry)
        self.truth.follow(entry)
        self._born |= entry.operation is Operation.MARK
        if self._born and self._matters(entry) and self.rng.random() < self._samples:
            self.judge(max(1, round(self._samples)))

    def _matters(self, entry: Entry) -> bool:
        """Whether it changes what may be found of the pages that are known."""
        if is_of_others(entry):
            return False
        if entry.operation in (Operation.WRITE, Operation.PUNCH):
            self._unsynced.add(entry.path)
        if entry.operation is Operation.SYNC:
            is_first = entry.path in self._unsynced
            self._unsynced.discard(entry.path)
            return is_first
        return entry.operation not in _NOT_JUDGED

    def _forget(self) -> File:
        """The server's host dies amid a life: what its disk has then."""
        disk = self._disk.copy()
        for entry in replay.read(self._record):
            if not is_of_others(entry):
                disk.step(entry)
        return disk.lose(self._is_far)[self._backing]

    def _is_far(self, path: Path) -> bool:
        return self._far is not None and path == self._backing

    def _is_here(self, path: Path) -> bool:
        return not self._is_far(path)

    def _write(self, files: dict[Path, File]) -> None:
        for path, file in files.items():
            if path != self._files:  # the directory was synced, too
                file.write_to(path, _reserved(path, file))

    def evict(self) -> None:
        """The page cache lets go of what it need not write, which a failed sync did not write either."""
        self._write(self._disk.evicted())

    def host_dies(self) -> None:
        """What the disk may have by now is all that is left; a server may live on."""
        server_too = self._far is not None and self.rng.random() < 0.5
        if self._far:
            self._far.kill()
        self._write(self._disk.lose(lambda path: server_too or self._is_here(path)))
        self.pool.unlink(missing_ok=True)
        self._boot = uuid.uuid4()
        self.truth.host_dies(server_too=server_too)

    def judge(self, samples: int) -> None:
        """Judge what this host's death may leave now: so many of the outcomes."""
        for _ in range(samples):
            self._judge_one()

    def _judge_one(self) -> None:
        shutil.rmtree(self._afterlife)
        self._afterlife.mkdir()
        server_too = self.rng.random() < 0.5
        for path, file in self._disk.after_death(lambda path: server_too or self._is_here(path)).items():
            file.write_to(self._afterlife / path.name)
        uri = self._after.uri if self._after else ""
        served = open_life(self.setting, self._afterlife, self._afterlife, uuid.uuid4(), uri)
        try:
            pages = dict(zip(PAGES, read_pages(served.core), strict=True))
        finally:
            served.close()
        for page, got in pages.items():
            kind = self.truth.after_death(page, got)
            self.found[kind] += 1
            assert kind is not Kind.WRONG, (
                f"the host died, and page {page} was read as {describe(got)}; {self.truth.allowed(page)}"
            )
