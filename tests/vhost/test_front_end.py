# SPDX-License-Identifier: BSD-3-Clause
"""Our own front end against QEMU's back end: what other tests say of our door, they say with it."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB
from tests.support.leftovers import dying_with_us
from tests.support.reference import Reference
from tests.support.vhost.disk import SECTOR, Disk, Kind
from tests.support.vhost.protocol import Connection, Feature, Message

SIZE = 8 * MIB
QUEUES = 3

Attach = Callable[..., Disk]

pytestmark = pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="no qemu-storage-daemon")


@contextlib.contextmanager
def storage_daemon(directory: Path, blockdev: str) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """QEMU's back end for a while; yields its socket and its process."""
    path = directory / "vhost.sock"
    export = f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={path},writable=on,num-queues={QUEUES}"
    command = ["qemu-storage-daemon", "--blockdev", f"{blockdev},node-name=disk", "--export", export]
    with subprocess.Popen(dying_with_us(command)) as daemon:
        try:
            yield path, daemon
        finally:
            daemon.kill()


@pytest.fixture
def attach(tmp_path: Path, file: Path) -> Iterator[Attach]:
    """Attaches a front end, whose options it takes, to a file."""
    with storage_daemon(tmp_path, f"file,filename={file},discard=unmap") as (path, _), contextlib.ExitStack() as undo:

        def attach(**options: object) -> Disk:
            disk = Disk(path, **options)  # type: ignore[arg-type]
            undo.callback(disk.shutdown)
            return disk

        yield attach


@pytest.mark.parametrize("queues", [1, QUEUES])
@pytest.mark.parametrize("refuse", [0, Feature.INDIRECT_DESC, Feature.EVENT_IDX], ids=["all", "direct", "flags"])
def test_what_is_written_is_there(attach: Attach, file: Path, queues: int, refuse: int) -> None:
    disk, reference, rng = attach(queues=queues, refuse=refuse), Reference(SIZE), random.Random(1)
    assert (disk.get_size(), disk.is_read_only()) == (SIZE, False)
    for step in range(300):
        length = rng.choice([1, 2, 7, 8, 9, 64, 130, 4100]) * SECTOR
        offset = rng.randrange((SIZE - length) // SECTOR + 1) * SECTOR
        what = rng.random()
        if what < 0.1:
            disk.zero(length, offset, rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            reference.write(offset, bytes(length))
        elif what < 0.6:
            data = (content(step, step + 1) * (length // PAGE + 1))[:length]
            disk.pwrite(data, offset, nbd.CMD_FLAG_FUA if what < 0.3 else 0)
            reference.write(offset, data)
        assert disk.pread(length, offset) == reference.read(offset, length)
    disk.trim(PAGE, 5 * PAGE)
    reference.write(5 * PAGE, bytes(PAGE))
    disk.flush()
    assert disk.pread(SIZE, 0) == reference.whole() == file.read_bytes()


def test_rings_go_round_many_times_with_many_requests_under_way(attach: Attach) -> None:
    disk = attach(queues=2, size=16)
    for turn in range(200):
        sent = [disk.submit(Kind.OUT, 8 * page, content(page, turn)) for page in range(20)]
        for each in sent:
            disk.wait(each)
        assert disk.pread(20 * PAGE, 0) == b"".join(content(page, turn) for page in range(20))
    assert disk.queues[0].used_index() > 10 * 16


def test_a_failed_request_is_an_error_and_the_next_one_is_not(attach: Attach) -> None:
    disk = attach()
    for offset in (SIZE, SIZE - PAGE):
        with pytest.raises(nbd.Error) as raised:
            disk.pread(2 * PAGE, offset)
        assert raised.value.errnum == errno.EIO
    with pytest.raises(nbd.Error) as raised:
        disk.wait(disk.submit(Kind.DISCARD, 0, bytes(5)))
    assert raised.value.errnum == errno.EIO
    assert disk.pread(PAGE, 0) == bytes(PAGE)


def test_queues_stop_and_go_on(attach: Attach) -> None:
    disk = attach(queues=2)
    for step in range(5):
        disk.pwrite(content(step, 1), step * PAGE)
        bases = disk.stop_queues()
        assert bases == [queue.used_index() for queue in disk.queues]
        disk.resume(bases)
    assert disk.pread(5 * PAGE, 0) == b"".join(content(step, 1) for step in range(5))


def test_a_back_end_that_goes_is_an_error_and_one_that_comes_is_taken_up(tmp_path: Path, file: Path) -> None:
    blockdev = f"file,filename={file}"
    with storage_daemon(tmp_path, blockdev) as (path, daemon):
        disk = Disk(path)
        disk.pwrite(content(1, 1), PAGE)
        daemon.kill()
        with pytest.raises(nbd.Error):
            disk.pread(PAGE, PAGE)
        with pytest.raises(nbd.Error):
            disk.connection.get_config(0, 8)
    with storage_daemon(tmp_path, blockdev):
        disk.reconnect()
        assert disk.pread(PAGE, PAGE) == content(1, 1)
        disk.shutdown()


def test_no_wait_is_longer_than_its_deadline(tmp_path: Path) -> None:
    with storage_daemon(tmp_path, f"null-co,size={SIZE},latency-ns=3600000000000") as (path, _):
        disk = Disk(path)
        disk.deadline = 0.1
        with pytest.raises(TimeoutError):
            disk.pread(PAGE, 0)
        disk.shutdown()
    ours, other = socket.socketpair()
    with ours, other, pytest.raises(TimeoutError):
        Connection(ours, 0.1).get(Message.GET_FEATURES)
