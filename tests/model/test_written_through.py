"""Pages that are written through: what is acknowledged of them is in the file, whatever failed before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.content import PAGE, compressible, incompressible
from tests.harness import MIB
from tests.model.index import Kind, kinds
from tests.model.rig import Rig
from tmemd.core import _core

PAGES = 4096


@pytest.fixture
def rig(pools: Path, disk: Path) -> Iterator[Rig]:
    """A device with room for all its pages."""
    rig = Rig(pools, disk, PAGES * PAGE, 32 * MIB)
    yield rig
    rig.close()


def on_disk(rig: Rig, page: int) -> bytes:
    """A page of the backing file."""
    assert rig.disk is not None
    with rig.disk.open("rb") as file:
        return os.pread(file.fileno(), PAGE, page * PAGE)


@pytest.mark.parametrize("page", [0, 1, 128, 256, 512, 1024, PAGES - 386, PAGES - 128, PAGES - 1])
def test_a_written_page_is_in_tmem_and_in_the_file(rig: Rig, page: int) -> None:
    for write in (compressible(page, 1), incompressible(page, 2), bytes(PAGE), compressible(page, 3)):
        rig.write(page * PAGE, write)
        assert on_disk(rig, page) == write
    assert kinds(rig.pool)[page] is Kind.TMEM
    assert rig.counters().spills == 0


@pytest.mark.parametrize("page", [129, 2000, PAGES - 385])
def test_other_pages_are_not(rig: Rig, page: int) -> None:
    rig.write(page * PAGE, compressible(page, 1))
    assert on_disk(rig, page) == bytes(PAGE)


@pytest.mark.parametrize("page", [0, 1, PAGES - 1])
def test_a_trim_reaches_the_file_after_a_write_that_failed_there(rig: Rig, page: int) -> None:
    rig.make_file_read_only()
    rig.reattach(clean=True)
    with pytest.raises(OSError, match=r"."):
        rig.write(page * PAGE, compressible(page, 1))
    rig.make_file_writable()
    rig.reattach(clean=True)
    leave_on_disk(rig, page, compressible(page, 1))
    _core.trim(rig.device, PAGE, page * PAGE, 0)
    assert on_disk(rig, page) == bytes(PAGE)
    assert kinds(rig.pool)[page] is Kind.NOWHERE


@pytest.mark.parametrize("page", [0, 1, PAGES - 1])
def test_a_trim_that_could_not_be_made_durable_is_done_again(rig: Rig, page: int) -> None:
    rig.write(page * PAGE, compressible(page, 1))
    rig.make_syncs_fail()
    rig.reattach(clean=True)
    for _ in range(2):
        with pytest.raises(OSError, match=r"."):
            _core.trim(rig.device, PAGE, page * PAGE, 0)
    rig.make_file_writable()
    rig.reattach(clean=True)
    _core.trim(rig.device, PAGE, page * PAGE, 0)
    assert on_disk(rig, page) == bytes(PAGE)
    assert kinds(rig.pool)[page] is Kind.NOWHERE


def leave_on_disk(rig: Rig, page: int, data: bytes) -> None:
    """What a write may have left that was reported as failed."""
    assert rig.disk is not None
    with rig.disk.open("r+b") as file:
        os.pwrite(file.fileno(), data, page * PAGE)
