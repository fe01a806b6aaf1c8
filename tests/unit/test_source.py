"""The source of a cache device while somebody writes to it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tmemd.device.source import open_source
from tmemd.store.poolfile import PoolError


def test_a_source_that_is_being_written_is_not_opened_to_read(tmp_path: Path) -> None:
    path, stop = tmp_path / "image", threading.Event()
    path.write_bytes(bytes(4096))

    def write() -> None:
        while not stop.wait(0.001):
            os.utime(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(PoolError, match="somebody is writing to it"):
            open_source(path, write=False)
    finally:
        stop.set()
        writer.join()


def test_a_source_that_was_written_just_now_is_opened_when_its_clock_has_gone_on(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    source = open_source(path, write=False)
    try:
        os.utime(path)
        assert time.time() - source.opened.st_ctime >= 0.01
        assert not source.is_as_opened()
    finally:
        source.close()
