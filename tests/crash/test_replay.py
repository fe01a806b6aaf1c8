"""The recorder and its replay, on a history small enough to know every outcome of."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.record import build_recorder, recording
from tests.crash.replay import SECTOR, Disk, parse

SCRIPT = """
import ctypes, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4 * 512)
os.pwrite(fd, b"a" * 512, 0)
os.fdatasync(fd)
os.pwrite(fd, b"b" * 512, 0)
os.pwritev(fd, [b"c" * 256, b"d" * 256], 512)
ctypes.CDLL(None).record_mark(ctypes.c_uint64(7))
"""


@pytest.fixture
def history(tmp_path: Path) -> bytes:
    """The record of SCRIPT."""
    environment = recording(build_recorder(tmp_path), tmp_path / "below", tmp_path / "record")
    (tmp_path / "below").mkdir()
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "below" / "x")], env=environment, check=True)
    return (tmp_path / "record").read_bytes()


def test_the_recorder_sees_every_operation_in_order(history: bytes, tmp_path: Path) -> None:
    entries = list(parse(history))
    kinds = [entry.operation.name for entry in entries]
    assert kinds == ["TRUNCATE", "WRITE", "SYNC", "WRITE", "WRITE", "MARK"]
    assert entries[4].data == b"c" * 256 + b"d" * 256
    assert entries[4].offset == SECTOR
    assert entries[0].path == tmp_path / "below" / "x"
    assert entries[5].offset == 7


def test_only_what_was_synced_is_sure_to_survive(history: bytes) -> None:
    disk = Disk()
    for entry in parse(history):
        disk.step(entry)
    rng = random.Random(1)
    outcomes = set()
    for _ in range(200):
        (file,) = disk.after_death(rng).values()
        assert file.size == 4 * SECTOR
        outcomes.add((file.sectors[0][:1], file.sectors.get(1, b"\0")[:1]))
    assert outcomes == {(b"a", b"\0"), (b"b", b"\0"), (b"a", b"c"), (b"b", b"c")}
