# SPDX-License-Identifier: BSD-3-Clause
"""One device that two hosts can reach: servers of their own pools, on a disk of which each has an end of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until
from tmemd.store.requests import Request

LEASE = 2.0  # seconds
SIZE = 64 * MIB
FAR = 8192  # a page that is written through by nobody


@dataclass
class Hosts:
    """Two of them, and the NBD server that both have their backing at."""

    serve: Serve
    disk: str  # its URI
    pools: Path

    def start(self, host: str, **keys: object) -> Server:
        """Serve the device there, with a pool of that host's own."""
        pools = self.pools / host
        pools.mkdir(exist_ok=True)
        return self.serve(device("web", pools, SIZE, self.disk, 8 * MIB, lease=LEASE, timeout=1, **keys))


@pytest.fixture
def hosts(serve: Serve, tmp_path: Path, pools: Path) -> Iterator[Hosts]:
    with far_disk(tmp_path) as uri:
        yield Hosts(serve, uri, pools)


@contextmanager
def far_disk(directory: Path) -> Iterator[str]:
    """A disk that a plain NBD server exports; any number of hosts reach it. Yields its URI."""
    socket, disk = directory / "far.sock", directory / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE + MIB)
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "file", str(disk)])
    try:
        wait_until(socket.exists, "the far server")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.kill()
        server.wait()


def read(server: Server, page: int) -> bytes:
    with server.client() as client:
        return bytes(client.pread(PAGE, page * PAGE))


def write(server: Server, page: int, version: int) -> None:
    with server.client() as client:
        client.pwrite(content(page, version), page * PAGE)


def finish(client: nbd.NBD, cookie: int) -> None:
    """Wait for a request. Raises nbd.Error if it failed."""
    while not client.aio_command_completed(cookie):
        client.poll(-1)


def test_a_device_that_another_host_serves_is_refused(hosts: Hosts) -> None:
    first = hosts.start("a")
    write(first, FAR, 1)
    with pytest.raises(AssertionError, match=f"host {os.uname().nodename} has the device, since .*epoch 1"):
        hosts.start("b")
    assert read(first, FAR) == content(FAR, 1)


def test_what_was_drained_and_let_go_is_there_at_once(hosts: Hosts) -> None:
    first = hosts.start("a", flush="durable")
    for page in (0, FAR):
        write(first, page, 1)
    assert first.stop() == 0
    second = hosts.start("b", flush="durable")
    assert [read(second, page) for page in (0, FAR)] == [content(0, 1), content(FAR, 1)]


def test_a_server_that_comes_back_on_its_host_has_its_pages(hosts: Hosts) -> None:
    first = hosts.start("a")
    write(first, FAR, 1)
    first.kill()
    again = hosts.start("a")
    assert read(again, FAR) == content(FAR, 1)


def test_a_host_that_was_stopped_serves_nothing_once_another_has_taken_over(hosts: Hosts) -> None:
    first = hosts.start("a")
    write(first, 0, 1)
    write(first, FAR, 1)
    client = first.connect()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = hosts.start("b")
        write(second, 0, 2)
        write(second, FAR, 2)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    for page in (0, FAR):
        with pytest.raises(nbd.Error):
            client.pwrite(content(page, 3), page * PAGE)
        with pytest.raises(nbd.Error):
            client.pread(PAGE, page * PAGE)
    client.shutdown()
    assert counters(hosts.pools / "a/web.pool").is_fenced
    wait_until(lambda: "nothing is served here any more" in first.log(), "it to notice")
    first.kill()
    assert [read(second, page) for page in (0, FAR)] == [content(0, 2), content(FAR, 2)]
    with pytest.raises(AssertionError, match="has the device"):
        hosts.start("a")


def test_what_was_in_the_other_hosts_ram_alone_is_lost_and_never_old(hosts: Hosts) -> None:
    first = hosts.start("a")
    write(first, FAR, 1)
    first.kill()
    second = hosts.start("b")
    with pytest.raises(nbd.Error):
        read(second, FAR)
    write(second, FAR, 2)
    second.kill()
    first = hosts.start("a")  # whose pool holds what nobody may read any more
    with pytest.raises(nbd.Error):
        read(first, FAR)


def test_a_lease_that_ran_out_is_renewed_if_nobody_took_the_device(hosts: Hosts) -> None:
    server = hosts.start("a")
    write(server, FAR, 1)
    pool = hosts.pools / "a/web.pool"
    os.kill(server.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: counters(pool).is_fenced, "the lease to run out")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    wait_until(lambda: not counters(pool).is_fenced, "it to be renewed")
    assert read(server, FAR) == content(FAR, 1)


# Standing by


def test_the_first_request_has_a_durable_device_let_go_of(hosts: Hosts) -> None:
    first = hosts.start("a", flush="durable")
    write(first, 0, 1)
    write(first, FAR, 1)
    second = hosts.start("b", flush="durable", standby="yes")
    with second.client() as client:
        assert client.get_size() == SIZE
        assert client.pread(PAGE, 0) == content(0, 1)  # which is in the file, whoever has the device
        client.flush()
        assert "asked for" not in second.log()
        write(first, FAR, 2)
        with first.client() as source:
            assert client.pread(PAGE, FAR * PAGE) == content(FAR, 2)
            with pytest.raises(nbd.Error):
                source.pwrite(content(FAR, 3), FAR * PAGE)
        client.pwrite(content(FAR, 4), FAR * PAGE)
        assert client.pread(PAGE, FAR * PAGE) == content(FAR, 4)
    assert "another host asked for the device, and has it now" in first.log()
    assert counters(hosts.pools / "a/web.pool").is_fenced
    assert second.stop() == 0


def test_what_is_nobodys_is_served_at_once_also_by_a_server_that_would_stand_by(hosts: Hosts) -> None:
    server = hosts.start("a", standby="yes")
    write(server, FAR, 1)
    server.kill()
    again = hosts.start("a", standby="yes")
    assert read(again, FAR) == content(FAR, 1)


def test_a_device_whose_host_died_is_taken_when_it_is_needed(hosts: Hosts) -> None:
    first = hosts.start("a", flush="durable")
    write(first, FAR, 1)
    second = hosts.start("b", flush="durable", standby="yes")
    first.kill()
    assert read(second, FAR) == content(FAR, 1)


def test_a_device_that_is_written_back_is_not_let_go_of(hosts: Hosts) -> None:
    first = hosts.start("a")
    write(first, FAR, 1)
    second = hosts.start("b", standby="yes")
    with second.client() as client:
        cookie = client.aio_pread(nbd.Buffer(PAGE), FAR * PAGE)
        wait_until(lambda: "asked for" in second.log(), "the request to be made")
        for _ in range(3):
            write(first, FAR, 2)
        assert not client.aio_command_completed(cookie)
        assert first.stop() == 0  # which lets go of it, and loses what is in its pool alone
        with pytest.raises(nbd.Error):
            finish(client, cookie)


def test_one_that_was_handed_over_is_let_go_of_whole(hosts: Hosts) -> None:
    first = hosts.start("a")
    pages = range(FAR, FAR + 200)
    for page in pages:
        write(first, page, 1)
    with Control(hosts.pools / "a/web.pool") as control:
        assert control.request(Request.HANDOVER) == 0
    second = hosts.start("b", standby="yes")
    with second.client() as client:
        for page in pages:
            assert client.pread(PAGE, page * PAGE) == content(page, 1)
    assert counters(hosts.pools / "b/web.pool").pages_lost == 0
