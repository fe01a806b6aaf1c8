# SPDX-License-Identifier: BSD-3-Clause
"""The list of a pool's hottest pages, and what is refused as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.model.rig import Rig
from tests.support.content import PAGE, compressible
from tmemd.store import hotlist
from tmemd.store.hotlist import HotList
from tmemd.store.poolfile import GENERATIONS, PoolError


def write(rig: Rig, *pages: int) -> None:
    """Into tmem."""
    for page in pages:
        rig.write(page * PAGE, compressible(page, 1))


def listed(rig: Rig) -> HotList:
    """The list of it."""
    return hotlist.of_pool(rig.pool_fd, rig.pool, rig.identity)


def test_what_was_used_last_comes_first(rig: Rig) -> None:
    write(rig, *range(500, 530))  # beyond the first block, and the last
    for _ in range(GENERATIONS):
        rig.device.begin_generation()
    write(rig, 700, 701, rig.identity.pages - 1)
    rig.device.begin_generation()
    rig.read(510 * PAGE, 2 * PAGE)
    last = rig.identity.pages - 1
    assert listed(rig).ranges == [(510, 2), (700, 2), (last, 1), (500, 10), (512, 18)]
    assert listed(rig).pages == 33


def test_only_what_is_in_ram_is_on_it(rig: Rig) -> None:
    write(rig, *range(600, 620))
    rig.device.drain()
    assert listed(rig).ranges == []
    write(rig, 603)
    rig.write(605 * PAGE, bytes(PAGE))
    assert listed(rig).ranges == [(603, 1)]


def test_it_can_be_read_again(rig: Rig, tmp_path: Path) -> None:
    write(rig, *range(600, 620))
    path = tmp_path / "list"
    path.write_bytes(msgspec.json.encode(listed(rig)))
    found = hotlist.read(path)
    assert found == listed(rig)
    found.check(rig.identity, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uuid": str(UUID(int=1))}, "another device"),
        ({"uuid": None}, "another device"),
        ({"size": PAGE}, "another device"),
        ({"ranges": [[1023, 2]]}, "pages that the device has not"),
        ({"ranges": [[-1, 2]]}, "is damaged, or no list"),
        ({"ranges": [[1 << 32, 1]]}, "is damaged, or no list"),
        ({"ranges": [[1]]}, "is damaged, or no list"),
        ({"name": "../x"}, "is damaged, or no list"),
    ],
)
def test_what_cannot_be_meant_is_refused(rig: Rig, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "list"
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(listed(rig)) | change))
    with pytest.raises(PoolError, match=words):
        hotlist.read(path).check(rig.identity, path)


@pytest.mark.parametrize("end", [0, -1])
def test_a_list_that_is_cut_off_is_refused(rig: Rig, tmp_path: Path, end: int) -> None:
    path = tmp_path / "list"
    path.write_bytes(msgspec.json.encode(listed(rig))[:end])
    with pytest.raises(PoolError, match="is damaged, or no list"):
        hotlist.read(path)


def test_a_pipe_is_no_list_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list")
    with pytest.raises(PoolError, match="no list of tmemctl"):
        hotlist.read(tmp_path / "list")


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"/list: No such file"):
        hotlist.read(tmp_path / "list")
