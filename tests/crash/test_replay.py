# SPDX-License-Identifier: BSD-3-Clause
"""The recorder and its replay, on a history small enough to know every outcome of."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.record import build_recorder, recording
from tests.crash.replay import SECTOR, Disk, Entry, File, Operation, parse

SCRIPT = """
import ctypes, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4 * 512)
os.pwrite(fd, b"a" * 512, 0)
os.fdatasync(fd)
os.pwrite(fd, b"b" * 512, 0)
os.pwrite(fd, b"c" * 512, 512)
ctypes.CDLL(None).record_mark(ctypes.c_uint64(7), ctypes.c_uint64(5))
"""
FAILING = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b"a" * 512, 0)
for attempt in range(2):
    try:
        os.fdatasync(fd)
    except OSError:
        os.write(1, b"failed sync\\n")
try:
    os.pwrite(fd, b"b" * 40 * 512, 512)
except OSError:
    os.write(1, b"failed write\\n")
os.pwrite(fd, b"c" * 512, 0)
"""


@dataclass
class Ended:
    """A process that was recorded."""

    status: int
    output: bytes
    entries: list[Entry]
    file: Path

    @property
    def kinds(self) -> list[str]:
        """What it did, in order."""
        return [entry.operation.name for entry in self.entries]


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script that changes the file it is told, with faults: run(SCRIPT, "1f") returns what came of it."""
    below, record, library = tmp_path / "below", tmp_path / "record", build_recorder(tmp_path)
    below.mkdir()

    def run(script: str, faults: str = "") -> Ended:
        ended = subprocess.run(
            [sys.executable, "-c", script, str(below / "x")], env=recording(library, below, record, faults),
            stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        return Ended(ended.returncode, ended.stdout, list(parse(record.read_bytes())), below / "x")

    return run


def replayed(entries: list[Entry], rng: random.Random) -> Disk:
    """The disk after all of these."""
    disk = Disk(rng)
    for entry in entries:
        disk.step(entry)
    return disk


def test_the_recorder_sees_every_operation_in_order(run: Run) -> None:
    ended = run(SCRIPT)
    assert ended.kinds == ["TRUNCATE", "WRITE", "SYNC", "WRITE", "WRITE", "MARK"]
    assert (ended.entries[4].offset, ended.entries[4].data) == (SECTOR, b"c" * SECTOR)
    assert ended.entries[0].path == ended.file
    assert (ended.entries[5].offset, ended.entries[5].length) == (7, 5)


def test_only_what_was_synced_is_sure_to_survive(run: Run) -> None:
    disk = replayed(run(SCRIPT).entries, random.Random(1))
    outcomes = set()
    for _ in range(200):
        (file,) = disk.after_death().values()
        assert file.size == 4 * SECTOR
        outcomes.add((file.sectors[0][:1], file.sectors.get(1, b"\0")[:1]))
    assert outcomes == {(b"a", b"\0"), (b"b", b"\0"), (b"a", b"c"), (b"b", b"c")}


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [("2b", ["TRUNCATE", "WRITE"]), ("2a", ["TRUNCATE", "WRITE", "SYNC"]), ("0s", ["TRUNCATE", "WRITE"])],
)
def test_a_process_is_killed_before_or_after_an_operation(run: Run, fault: str, kinds: list[str]) -> None:
    ended = run(SCRIPT, fault)
    assert (ended.status, ended.kinds) == (-signal.SIGKILL, kinds)


def test_a_failed_sync_is_never_made_up_for(run: Run) -> None:
    ended = run(FAILING, "1f")
    assert (ended.output, ended.kinds) == (b"failed sync\n", ["WRITE", "SYNC_FAILED", "SYNC", "WRITE", "WRITE"])
    outcomes = set()
    for seed in range(50):
        disk = replayed(ended.entries[:3], random.Random(seed))
        (left,), (read,) = disk.after_death().values(), disk.evicted().values()
        assert left == read
        outcomes.add(read.sectors.get(0, b"\0")[:1])
    assert outcomes == {b"a", b"\0"}


def test_a_failed_write_has_changed_some_sectors(run: Run) -> None:
    ended = run(FAILING, "3f")
    assert ended.output == b"failed write\n"
    (torn,) = (entry for entry in ended.entries if entry.operation is Operation.TORN)
    assert (torn.offset, torn.length) == (SECTOR, 40 * SECTOR)
    data = ended.file.read_bytes().ljust(41 * SECTOR, b"\0")
    assert {data[at : at + SECTOR] for at in range(SECTOR, len(data), SECTOR)} == {bytes(SECTOR), b"b" * SECTOR}


def test_a_renamed_file_keeps_its_content(run: Run) -> None:
    ended = run(SCRIPT + "os.rename(sys.argv[1], sys.argv[1] + '2')")
    assert ended.kinds[-1] == "RENAME"
    ((path, file),) = replayed(ended.entries, random.Random(1)).evicted().items()
    assert (path.name, file) == ("x2", File.read_from(path))


@pytest.mark.parametrize("faults", ["", "3f"])
def test_replayed_and_read_the_files_are_the_same(run: Run, faults: str) -> None:
    ended = run(FAILING, faults)
    (read,) = replayed(ended.entries, random.Random(1)).evicted().values()
    assert read == File.read_from(ended.file)
