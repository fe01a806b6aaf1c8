# SPDX-License-Identifier: BSD-3-Clause
"""The source of a cache device while somebody writes to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.harness import MIB
from tmemd.binding import _core
from tmemd.device import files
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import open_device
from tmemd.device.source import open_source
from tmemd.store.poolfile import PoolError


def test_a_source_that_is_being_written_is_not_opened_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sleep = tmp_path / "image", time.sleep
    path.write_bytes(bytes(4096))

    def sleep_and_write(seconds: float) -> None:
        sleep(seconds)
        os.utime(path)

    monkeypatch.setattr(time, "sleep", sleep_and_write)
    with pytest.raises(PoolError, match="somebody is writing to it"):
        open_source(DeviceConfig("device", 4096, None, source=path))


def test_a_source_that_was_written_just_now_is_opened_when_its_clock_has_gone_on(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    source = open_source(DeviceConfig("device", 4096, None, source=path))
    try:
        os.utime(path)
        assert source.opened
        assert time.time() - source.opened.st_ctime >= 0.01
        assert not source.is_as_opened()
    finally:
        source.close()


def test_what_is_written_while_it_is_opened_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, use_direct = tmp_path / "image", files.use_direct
    path.write_bytes(bytes(4096))

    def write_first(fd: int, path: Path) -> bool:
        path.write_bytes(bytes(8192))
        return use_direct(fd, path)

    monkeypatch.setattr(files, "use_direct", write_first)
    source = open_source(DeviceConfig("device", 4096, None, source=path))
    try:
        assert not source.is_as_opened()
    finally:
        source.close()


@pytest.fixture
def large_sectors(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk whose sectors are as large as pages."""
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("mounting needs root")
    disk, directory = tmp_path / "disk", tmp_path / "mounted"
    disk.write_bytes(bytes(64 * MIB))
    directory.mkdir()
    command = ["losetup", "--sector-size", "4096", "--find", "--show", str(disk)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"losetup: {result.stderr.strip()}")
    loop = result.stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", loop], check=True)
        subprocess.run(["mount", loop, str(directory)], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_source_may_end_within_a_sector(large_sectors: Path, pools: Path) -> None:
    path, data = large_sectors / "image", os.urandom(9 * 4096 + 512)
    path.write_bytes(data)
    config = DeviceConfig("image", len(data), None, 8 * MIB, pools, source=path, write_through=True)
    found = bytearray(len(data))
    with closing(open_device(config)) as served:
        _core.pread(served.core, found, 0, 0)
        assert found == data
        _core.pwrite(served.core, b"x" * 512, 9 * 4096, 0)
        _core.flush(served.core, 0)
    assert path.read_bytes() == data[:-512] + b"x" * 512
