"""The host dies at any moment: what is left on disk is the newest content, or says that it is lost."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from tests.content import PAGE
from tests.crash.history import PAGES, SIZE, Step, history
from tests.crash.life import open_life
from tests.crash.record import build_recorder, recording
from tests.crash.replay import Disk, File, Operation, parse
from tests.harness import ROOT
from tests.model.reference import Reference
from tmemd.core import _core

STEPS = 120


def live(files: Path, pools: Path, seed: int, *options: str) -> bytes:
    """Live a history in a process of its own; returns the record of what was done to the disk."""
    record = pools / "record"
    environment = recording(build_recorder(pools), files, record)
    command = [sys.executable, "-m", "tests.crash.life", str(files), str(pools), str(seed), str(STEPS), *options]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    return record.read_bytes()


def is_written_through(page: int) -> bool:
    """Whether blkid reads it, so that it is never lost (docs/pool-format.md)."""
    from_end = SIZE // PAGE - page
    return page <= 128 or page in (256, 512, 1024) or from_end <= 128 or from_end == 386


class Truth:
    """What each page may be: the newest acknowledged content, or that of the step that was under way."""

    def __init__(self, steps: list[Step], before: dict[int, bytes] | None = None) -> None:
        self._steps = steps
        self._now, self._next = Reference(SIZE), Reference(SIZE)
        for page, data in (before or {}).items():
            self._now.write(page * PAGE, data)
            self._next.write(page * PAGE, data)
        self._done = -1
        self.advance()

    def advance(self) -> None:
        """One more step was acknowledged."""
        self._done += 1
        if self._done:
            self._steps[self._done - 1].happen_to(self._now)
        if self._done < len(self._steps):
            self._steps[self._done].happen_to(self._next)

    def allows(self, page: int, got: bytes) -> bool:
        """Whether *page* may be *got*. What is written through is overwritten in place: sectors of it may be torn."""
        old, new = (side.read(page * PAGE, PAGE) for side in (self._now, self._next))
        if not is_written_through(page):
            return got in (old, new)
        return all(got[at : at + 512] in (old[at : at + 512], new[at : at + 512]) for at in range(0, PAGE, 512))


class Afterlife:
    """Attaches to what is left on disk, on a host that has booted anew, and judges each page."""

    def __init__(self, directory: Path, *, lost_zero: bool) -> None:
        self._directory, self._lost_zero = directory, lost_zero
        self.seen: Counter[str] = Counter()

    def judge(self, files: dict[Path, File], truth: Truth) -> None:
        """Every page is what *truth* allows, or lost; those that blkid reads never are."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        for path, file in files.items():
            file.write_to(self._directory / path.name)
        served = open_life(self._directory, self._directory, uuid.uuid4(), lost_zero=self._lost_zero)
        try:
            wrong = [page for page in PAGES if not self._is_right(page, served.core, truth)]
        finally:
            served.close()
        assert wrong == []

    def _is_right(self, page: int, core: _core.Device, truth: Truth) -> bool:
        got = bytearray(PAGE)
        try:
            _core.pread(core, got, page * PAGE, 0)
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017
            self.seen["lost"] += 1
            return not is_written_through(page) and not self._lost_zero
        self.seen["zeros" if not any(got) else "newest"] += 1
        return truth.allows(page, bytes(got)) or (self._lost_zero and not is_written_through(page) and not any(got))


@pytest.fixture
def files(pools: Path) -> Path:
    """A directory for a backing file and its map; in tmpfs, where a sync costs nothing."""
    directory = pools / "files"
    directory.mkdir()
    return directory


def die_at_every_moment(record: bytes, disk: Disk, truth: Truth, afterlife: Afterlife, seed: int) -> None:
    """Judge what any prefix of *record* may leave on *disk*, from the first moment the device could be used."""
    rng = random.Random(seed)
    alive = False
    for entry in parse(record):
        disk.step(entry)
        if entry.operation is Operation.MARK:
            if alive:
                truth.advance()
            alive = True
        if alive:
            for _ in range(2):
                afterlife.judge(disk.after_death(rng), truth)
    assert alive


@pytest.mark.parametrize(
    ("seed", "options", "lost_zero"),
    [(1, [], False), (2, ["--durable"], False), (3, ["--durable"], True), (4, [], True)],
)
def test_invariant_6_every_prefix_with_any_unsynced_writes_missing(
    files: Path, pools: Path, seed: int, options: list[str], lost_zero: bool
) -> None:
    record = live(files, pools, seed, *options)
    afterlife = Afterlife(pools / "afterlife", lost_zero=lost_zero)
    die_at_every_moment(record, Disk(), Truth(history(seed, STEPS)), afterlife, seed)
    assert afterlife.seen["newest"] > 100
    assert afterlife.seen["zeros" if lost_zero else "lost"] > 100


def found_after_death(files: Path, pools: Path, seed: int) -> dict[int, bytes]:
    """What the pages are in *files* on another host; noise no read can equal for those that are lost."""
    rng = random.Random(seed)
    served = open_life(files, pools, uuid.uuid4())
    found = {}
    for page in PAGES:
        data = bytearray(PAGE)
        try:
            _core.pread(served.core, data, page * PAGE, 0)
        except OSError:
            data = bytearray(rng.randbytes(PAGE))
        found[page] = bytes(data)
    served.close()
    return found


@pytest.mark.parametrize(("seed", "options"), [(5, []), (6, ["--durable"])])
def test_invariant_6_a_host_that_dies_twice(files: Path, pools: Path, seed: int, options: list[str]) -> None:
    rng = random.Random(seed)
    disk = Disk()
    for entry in parse(live(files, pools, seed, *options)):
        disk.step(entry)
    left = disk.after_death(rng)
    for path, file in left.items():
        if path != files:  # the directory was synced too
            file.write_to(path)
    (pools / "life.pool").unlink()
    before = found_after_death(files, pools, seed)
    (pools / "life.pool").unlink()
    left = {path: File.read_from(path) for path in files.iterdir()}
    record = live(files, pools, seed + 100, *options, "--whole-pages")
    truth = Truth(history(seed + 100, STEPS, parts=False), before)
    afterlife = Afterlife(pools / "afterlife", lost_zero=False)
    die_at_every_moment(record, Disk(left), truth, afterlife, seed)
    assert min(afterlife.seen["newest"], afterlife.seen["lost"]) > 100
