# SPDX-License-Identifier: BSD-3-Clause
"""One device that two hosts can reach: servers of their own pools, on a disk of which each has an end of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control, Serve, Server, counters, device, wait_until
from tmemd.device.files import LocalStore
from tmemd.store import tail
from tmemd.store.requests import Request

pytestmark = pytest.mark.slow  # most of it waits for leases to run out

LEASE = 2.0  # seconds
SIZE = 64 * MIB
FAR = 8192  # a page that is written through by nobody


class FarDisk:
    """A disk that a plain NBD server exports; any number of hosts reach it."""

    def __init__(self, directory: Path) -> None:
        self._socket, self._disk = directory / "far.sock", directory / "disk"
        with self._disk.open("wb") as file:
            file.truncate(SIZE + MIB)
        self.uri = f"nbd+unix:///?socket={self._socket}"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._server = subprocess.Popen(["nbdkit", "-f", "-U", str(self._socket), "file", str(self._disk)])
        wait_until(self._socket.exists, "the far server")

    def stop(self) -> None:
        if self._server:
            self._server.kill()
            self._server.wait()

    def ask_for_it(self) -> None:
        """Ask whoever has the device to let go, as a host does that dies then."""
        fd = os.open(self._disk, os.O_RDWR)
        try:
            found = tail.find(LocalStore(fd), "here")
            assert found
            found.write_request(tail.Request(found.ownership().claim.epoch, uuid.uuid4(), "nobody"))
        finally:
            os.close(fd)


@dataclass
class Hosts:
    """Two of them, and the backing that both reach."""

    serve: Serve
    disk: str
    pools: Path
    far: FarDisk | None = None  # that this is

    def parameters(self, host: str, **keys: object) -> list[str]:
        """Of the device there, with a pool of that host's own."""
        pools = self.pools / host
        pools.mkdir(exist_ok=True)
        keys = {"lease": LEASE, "timeout": LEASE / 2} | keys
        return device("web", pools, SIZE, self.disk, 8 * MIB, **keys)

    def start(self, host: str, **keys: object) -> Server:
        """Serve it."""
        return self.serve(self.parameters(host, **keys))


@pytest.fixture
def hosts(serve: Serve, tmp_path: Path, pools: Path) -> Iterator[Hosts]:
    far = FarDisk(tmp_path)
    far.start()
    try:
        yield Hosts(serve, far.uri, pools, far)
    finally:
        far.stop()


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


def test_requests_wait_for_a_lease_that_ran_out(hosts: Hosts) -> None:
    server = hosts.start("a", lease=8, timeout=4)
    pool = hosts.pools / "a/web.pool"
    with server.client() as client:
        client.pwrite(content(FAR, 1), FAR * PAGE)
        found = nbd.Buffer(PAGE)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            requests = [client.aio_pread(found, FAR * PAGE), client.aio_flush()]
            wait_until(lambda: counters(pool).is_fenced, "the lease to run out")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for request in requests:
            finish(client, request)
        assert found.to_bytearray() == content(FAR, 1)


def test_nothing_waits_for_longer_than_the_claim_that_others_go_by_allows(hosts: Hosts) -> None:
    hosts.start("a").kill()
    server = hosts.start("a", lease=2000, timeout=1000)  # who goes on with the claim of before
    with server.client() as client:
        assert hosts.far
        hosts.far.stop()
        request = client.aio_pwrite(nbd.Buffer.from_bytearray(content(0, 1)), 0)
        with pytest.raises(nbd.Error):
            wait_until(lambda: client.poll(10) >= 0 and client.aio_command_completed(request), "it to fail")


def test_of_two_hosts_that_take_a_dead_ones_device_at_once_one_has_it(hosts: Hosts, tmp_path: Path) -> None:
    hosts.start("a").kill()
    servers = []
    for host in ("b", "c"):
        (tmp_path / host).mkdir()
        servers.append(Server(tmp_path / host, hosts.parameters(host)))
    try:
        with ThreadPoolExecutor() as pool:  # whose servers die with its threads
            errors = list(pool.map(error_of, servers))
            loser = 0 if errors[0] else 1
            assert "has the device" in str(errors[loser])
            assert errors[1 - loser] is None
            write(servers[1 - loser], FAR, 1)
            assert read(servers[1 - loser], FAR) == content(FAR, 1)
    finally:
        for server in servers:
            server.kill()


def error_of(server: Server) -> AssertionError | None:
    """Why it does not start."""
    try:
        server.start()
    except AssertionError as error:
        return error
    return None


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


def test_a_device_whose_heir_died_is_its_old_hosts_again(hosts: Hosts) -> None:
    server = hosts.start("a", flush="durable")
    write(server, FAR, 1)
    assert hosts.far
    hosts.far.ask_for_it()
    wait_until(lambda: "another host asked for the device" in server.log(), "it to let go")
    with pytest.raises(nbd.Error):
        read(server, FAR)
    server.kill()
    again = hosts.start("a", flush="durable")
    assert read(again, FAR) == content(FAR, 1)
    assert counters(hosts.pools / "a/web.pool").pages_in_tmem  # its pool counts still


# What the backing can be


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[list[str]]:
    """Two block devices that are one disk, as two hosts have it."""
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("losetup needs root")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE + MIB)
    with ExitStack() as undo:
        found = []
        for _ in range(2):
            command = ["losetup", "--find", "--show", "--direct-io=on", str(disk)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                pytest.skip(f"losetup: {result.stderr.strip()}")
            found.append(result.stdout.strip())
            undo.callback(subprocess.run, ["losetup", "--detach", found[-1]], check=True)
        yield found


def test_a_block_device_is_picked_up_by_another_host(
    loops: list[str], serve: Serve, pools: Path, request: pytest.FixtureRequest
) -> None:
    first = Hosts(serve, loops[0], pools).start("a", flush="durable")
    request.addfinalizer(first.kill)  # before the disk goes
    for page in (0, FAR):
        write(first, page, 1)
    with pytest.raises(AssertionError, match="has the device"):
        Hosts(serve, loops[1], pools).start("b")
    second = Hosts(serve, loops[1], pools).start("b", flush="durable", standby="yes")
    request.addfinalizer(second.kill)
    assert [read(second, page) for page in (0, FAR)] == [content(0, 1), content(FAR, 1)]
    write(second, FAR, 2)
    second.kill()
    first.kill()
    assert read(Hosts(serve, loops[0], pools).start("a", flush="durable"), FAR) == content(FAR, 2)


def test_two_servers_of_one_host_hand_a_block_device_to_each_other(
    loops: list[str], serve: Serve, pools: Path, request: pytest.FixtureRequest
) -> None:
    hosts = Hosts(serve, loops[0], pools)
    first = hosts.start("a", flush="durable")
    request.addfinalizer(first.kill)
    write(first, FAR, 1)
    second = hosts.start("b", flush="durable", standby="yes")
    request.addfinalizer(second.kill)
    assert read(second, FAR) == content(FAR, 1)
    assert first.alive()  # though the disk is locked by the other now
    with pytest.raises(nbd.Error):
        read(first, FAR)


def test_a_server_that_comes_back_with_another_disk_is_not_used(hosts: Hosts, tmp_path: Path) -> None:
    assert hosts.far
    server = hosts.start("a", flush="durable")
    write(server, FAR, 1)
    with server.client() as client:
        hosts.far.stop()
        disk = tmp_path / "disk"
        ours = disk.rename(tmp_path / "ours")
        with disk.open("wb") as file:
            file.truncate(SIZE + MIB)
        hosts.far.start()
        with pytest.raises(nbd.Error):
            client.pwrite(content(FAR, 2), FAR * PAGE)
        assert not disk.read_bytes().strip(b"\0")
        hosts.far.stop()
        ours.rename(disk)
        hosts.far.start()
        wait_until(lambda: is_written(client, FAR, 3), "it to be used again")
    assert read(server, FAR) == content(FAR, 3)


def is_written(client: nbd.NBD, page: int, version: int) -> bool:
    with suppress(nbd.Error):
        client.pwrite(content(page, version), page * PAGE)
        return True
    return False
