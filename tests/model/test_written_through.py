# SPDX-License-Identifier: BSD-3-Clause
"""Pages that are written through: what is acknowledged of them is in the file, whatever failed before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.rig import REGION, OpenDevice, Rig, writes_end_at
from tests.support.content import PAGE, compressible, incompressible
from tests.support.harness import MIB
from tests.support.index import Kind, kinds
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.check import check_pool
from tmemd.store.poolindex import BLOCK_BYTES, State, block_count

PAGES = 4096


@pytest.fixture
def rig(core_device: OpenDevice) -> Rig:
    """A device with room for all its pages."""
    return core_device(PAGES * PAGE, 32 * MIB)


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
    with writes_end_at(page * PAGE + 512), pytest.raises(OSError, match=r"."):
        rig.write(page * PAGE, compressible(page, 1))
    assert any(on_disk(rig, page))
    _core.trim(rig.device, PAGE, page * PAGE, 0)
    assert on_disk(rig, page) == bytes(PAGE)
    assert kinds(rig.pool)[page] is Kind.NOWHERE


@pytest.mark.parametrize("old", [compressible(0, 1), bytes(PAGE)])
@pytest.mark.parametrize("page", [0, 1, PAGES - 1])
def test_what_a_write_that_failed_left_in_the_file_is_mended_on_attach(rig: Rig, page: int, old: bytes) -> None:
    rig.write(page * PAGE, old)
    with writes_end_at(page * PAGE + 512), pytest.raises(OSError, match=r"."):
        rig.write(page * PAGE, compressible(page, 2))
    assert on_disk(rig, page) != old
    rig.reattach(clean=False)
    assert rig.read(page * PAGE, PAGE) == on_disk(rig, page) == old


@pytest.mark.parametrize("page", [0, 1, PAGES - 1])
def test_after_a_failed_sync_nothing_is_durable_whoever_serves_the_pool(rig: Rig, page: int) -> None:
    rig.write(page * PAGE, compressible(page, 1))
    rig.make_syncs_fail()
    rig.reattach(clean=True)
    assert rig.counters().sync_failed
    rig.make_file_writable()
    rig.reattach(clean=False)
    for call in (_core.trim, _core.zero):
        with pytest.raises(OSError, match=r"."):
            call(rig.device, PAGE, page * PAGE, 0)
    with pytest.raises(OSError, match=r"."):
        rig.device.drain()
    assert rig.read(page * PAGE, PAGE) in (compressible(page, 1), bytes(PAGE))


def test_after_a_failed_sync_a_clean_page_is_not_dropped(rig: Rig) -> None:
    rig.write(PAGE, compressible(1, 1))
    rig.make_syncs_fail()
    rig.reattach(clean=True)
    rig.make_file_writable()
    rig.reattach(clean=True)
    leave_on_disk(rig, 1, compressible(1, 0))  # what a disk may hold that has lost a write
    rig.device.demote(1 << 30)
    assert rig.read(PAGE, PAGE) == compressible(1, 1)


def forget_index(rig: Rig) -> None:
    """As after the host died: all pages are in the file, and no checksum is known."""
    rig.device.close()
    os.pwrite(rig.pool_fd, bytes([State.FILE]) * block_count(rig.size), poolfile.STATES_OFFSET)
    rig.reattach(clean=True)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("overwrite", "page"),
    [
        (lambda rig, page: rig.write(page * PAGE, incompressible(page, 2)), 1),
        (lambda rig, page: rig.write(page * PAGE, incompressible(page, 2)), 300),
        (lambda rig, page: _core.zero(rig.device, PAGE, page * PAGE, 0), 1),
    ],
)
def test_an_overwrite_that_fails_half_way_leaves_no_mixture_that_reads_as_data(
    core_device: OpenDevice, pools: Path, overwrite: Callable[[Rig, int], None], page: int, *, known: bool
) -> None:
    # On tmpfs zeros are written too, for it cannot zero a range.
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing")
    rig.frozen(True)
    rig.write(page * PAGE, incompressible(page, 1))
    if not known:
        forget_index(rig)
    with writes_end_at(page * PAGE + 512), pytest.raises(OSError, match=r"."):
        overwrite(rig, page)
    for _ in range(2):
        with pytest.raises(OSError, match=r"."):
            rig.read(page * PAGE, PAGE)
        rig.reattach(clean=False)
    assert check_pool(rig.pool).problems == []
    rig.write(page * PAGE, incompressible(page, 3))
    assert rig.read(page * PAGE, PAGE) == incompressible(page, 3)


def fail_to_overwrite(rig: Rig, page: int) -> None:
    """Write a page, and write it again: only a part of that reaches the file."""
    rig.write(page * PAGE, incompressible(page, 1))
    with writes_end_at(page * PAGE + 512), pytest.raises(OSError, match=r"."):
        rig.write(page * PAGE, incompressible(page, 2))


def assert_unreadable(rig: Rig, page: int) -> None:
    """A page is an error, not data."""
    with pytest.raises(OSError, match=r"."):
        rig.read(page * PAGE, PAGE)


def lose_host(rig: Rig) -> None:
    """As after the host died: what the map's bits call in question is lost, all else is in the file, unverified."""
    assert rig.disk is not None
    bits = Path(f"{rig.disk}.map").read_bytes()[PAGE:]
    rig.device.close()
    per_region = REGION // BLOCK_BYTES
    states = (
        State.LOST if bits[block // per_region // 8] >> block // per_region % 8 & 1 else State.FILE
        for block in range(block_count(rig.size))
    )
    os.pwrite(rig.pool_fd, bytes(states), poolfile.STATES_OFFSET)
    rig.reattach(clean=True)


def test_a_mixture_is_not_taken_for_data_when_the_host_dies_after_a_drain(core_device: OpenDevice, pools: Path) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing")
    rig.frozen(True)
    fail_to_overwrite(rig, 300)
    rig.device.drain()
    lose_host(rig)
    assert_unreadable(rig, 300)


def test_a_page_that_a_failed_write_did_not_reach_is_what_it_was(core_device: OpenDevice, pools: Path) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing")
    rig.frozen(True)
    rig.write(300 * PAGE, incompressible(300, 1))
    with writes_end_at(300 * PAGE), pytest.raises(OSError, match=r"."):
        rig.write(300 * PAGE, incompressible(300, 2))
    assert rig.read(300 * PAGE, PAGE) == incompressible(300, 1)
    rig.device.drain()
    lose_host(rig)
    assert rig.read(300 * PAGE, PAGE) == incompressible(300, 1)


def test_what_a_durable_device_wrote_is_lost_with_the_host_if_it_cannot_be_synced_when_it_is_none_any_more(
    core_device: OpenDevice,
) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, durable=True)
    rig.write(300 * PAGE, compressible(300, 1))
    _core.flush(rig.device, 0)
    rig.write(300 * PAGE, compressible(300, 2))
    rig.make_syncs_fail()
    rig.make_durable(False)
    rig.reattach(clean=False)
    assert rig.read(300 * PAGE, PAGE) == compressible(300, 2)
    _core.flush(rig.device, 0)
    rig.make_file_writable()
    leave_on_disk(rig, 300, compressible(300, 1))  # what a disk may hold that has lost a write
    lose_host(rig)
    assert_unreadable(rig, 300)


def test_what_cannot_be_made_durable_is_not_served(rig: Rig) -> None:
    rig.write(2000 * PAGE, compressible(2000, 1))
    rig.make_durable(True)
    rig.make_file_read_only()
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.reattach(clean=True)


def flush(rig: Rig) -> None:
    """What the guest asks for."""
    _core.flush(rig.device, 0)


def kill(rig: Rig) -> None:
    """SIGKILL, and the device is served as it was."""
    rig.reattach(clean=False)


def drain(rig: Rig) -> None:
    """What the user asks for before a reboot."""
    rig.device.drain()


@pytest.mark.parametrize(
    ("durable", "page", "then"),
    [(True, 300, flush), (True, 300, kill), (True, 300, drain), (False, 1, flush), (False, 1, kill), (False, 1, drain)],
)
@pytest.mark.parametrize("old", [incompressible(1, 1), bytes(PAGE)])
def test_what_a_failed_overwrite_left_in_tmem_is_in_the_file_again(
    core_device: OpenDevice, pools: Path, then: Callable[[Rig], None], page: int, old: bytes, *, durable: bool
) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing", durable=durable)
    rig.write(page * PAGE, old)
    flush(rig)
    with writes_end_at(page * PAGE + 512), pytest.raises(OSError, match=r"."):
        rig.write(page * PAGE, incompressible(page, 2))
    assert rig.read(page * PAGE, PAGE) == old
    then(rig)
    assert on_disk(rig, page) == old


def test_a_flush_is_not_acknowledged_while_the_file_lacks_what_is_read(core_device: OpenDevice, pools: Path) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing", durable=True)
    rig.write(300 * PAGE, incompressible(300, 1))
    with writes_end_at(300 * PAGE + 512):
        with pytest.raises(OSError, match=r"."):
            rig.write(300 * PAGE, incompressible(300, 2))
        with pytest.raises(OSError, match=r"."):
            flush(rig)
        assert rig.read(300 * PAGE, PAGE) == incompressible(300, 1)
    flush(rig)
    assert on_disk(rig, 300) == incompressible(300, 1)


@pytest.mark.parametrize("in_tmem", [True, False])
def test_what_a_durable_device_could_not_write_is_lost_with_the_host_when_it_is_none_any_more(
    core_device: OpenDevice, pools: Path, *, in_tmem: bool
) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing", durable=True)
    rig.frozen(not in_tmem)
    fail_to_overwrite(rig, 300)
    rig.make_durable(False)
    rig.reattach(clean=False)
    lose_host(rig)
    assert_unreadable(rig, 300)


def killed_while_it_writes(rig: Rig, page: int, data: bytes) -> None:
    """Write a page in a process that is killed before any of it reaches the file."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with writes_end_at(page * PAGE):
            rig.write(page * PAGE, data)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ


def test_a_mixture_is_not_taken_for_data_when_the_next_overwrite_is_killed(
    core_device: OpenDevice, pools: Path
) -> None:
    rig = core_device(PAGES * PAGE, 32 * MIB, disk=pools / "backing")
    rig.frozen(True)
    fail_to_overwrite(rig, 300)
    killed_while_it_writes(rig, 300, incompressible(300, 3))
    rig.reattach(clean=False)
    assert_unreadable(rig, 300)


def leave_on_disk(rig: Rig, page: int, data: bytes) -> None:
    """What a write may have left that was reported as failed."""
    assert rig.disk is not None
    with rig.disk.open("r+b") as file:
        os.pwrite(file.fileno(), data, page * PAGE)
