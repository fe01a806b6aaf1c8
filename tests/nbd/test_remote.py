# SPDX-License-Identifier: BSD-3-Clause
"""A backing or source that an NBD server exports, and what a guest sees when that fails like a network."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, incompressible
from tests.support.harness import (
    DEADLINE,
    MIB,
    Control,
    Serve,
    Server,
    cache_device,
    counters,
    device,
    environment,
    nbdkit_command,
    wait_until,
    waiting,
)  # fmt: skip
from tests.support.index import Kind, kinds
from tests.support.mounts import mountable
from tests.support.remotes import VOLATILE, Remote, volatile
from tmemd import cli
from tmemd.cli import common as cli_common
from tmemd.device import offline
from tmemd.store import poolfile
from tmemd.store.requests import Queued, Request

SIZE = 64 * MIB
PAGES = 512  # that are used: more than the pool can hold
ROOM = MIB  # of the pool, for about 240 of them
FIRST = 2048  # of those used: none that is written through
TIMEOUT = 2.0


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    with volatile(tmp_path / "remote", SIZE) as server:
        yield server.start()


class Far:
    """A swap device, full beyond its RAM, whose backing is a server's."""

    def __init__(self, serve: Serve, pools: Path, remote: Remote, **keys: object) -> None:
        self.remote, self.pool = remote, pools / "far.pool"
        keys = {"bitmap": remote.run / "map", "timeout": TIMEOUT} | keys
        self.server: Server = serve(device("far", pools, SIZE, remote.uri, ROOM, **keys))

    def fill(self, client: nbd.NBD, version: int) -> None:
        for page in range(FIRST, FIRST + PAGES):
            client.pwrite(incompressible(page, version), page * PAGE)

    def check(self, client: nbd.NBD, version: int) -> None:
        for page in range(FIRST, FIRST + PAGES):
            assert client.pread(PAGE, page * PAGE) == incompressible(page, version), page

    def state(self) -> poolfile.RemoteState:
        with open(self.pool, "rb") as file:
            return poolfile.Snapshot().take(file.fileno(), self.pool).remote()

    def has_lost_more(self, before: poolfile.RemoteState) -> bool:
        return self.state().losses > before.losses

    def in_tmem(self) -> list[int]:
        """Pages that need no server."""
        found = kinds(self.pool)
        return [page for page in range(FIRST, FIRST + PAGES) if found[page] in (Kind.TMEM, Kind.ZERO)]

    def asked(self) -> list[Queued]:
        with open(self.pool, "rb") as file:
            return waiting(file.fileno())

    def drain(self) -> int:
        with Control(self.pool) as control:
            return control.request(Request.DRAIN)


class Reads:
    """Reads of pages that are under way; libnbd waits for none of them before `wait`."""

    def __init__(self, client: nbd.NBD, pages: Iterable[int]) -> None:
        self._client = client
        self._buffers = {page: nbd.Buffer(PAGE) for page in pages}
        self._cookies = [client.aio_pread(buffer, page * PAGE) for page, buffer in self._buffers.items()]

    def wait(self) -> dict[int, bytes]:
        """What was read. Raises nbd.Error for one that failed, when all are done."""
        while self._client.aio_in_flight():
            self._client.poll(-1)
        for cookie in self._cookies:
            self._client.aio_command_completed(cookie)
        return {page: bytes(buffer.to_bytearray()) for page, buffer in self._buffers.items()}


@pytest.fixture
def far(serve: Serve, pools: Path, remote: Remote) -> Far:
    return Far(serve, pools, remote)


@pytest.mark.parametrize(
    "plugin",
    [["file", "{disk}"], ["memory", str(SIZE)], ["--filter=delay", "file", "{disk}", "rdelay=1ms", "wdelay=1ms"],
     ["--filter=noparallel", "file", "{disk}"], ["--filter=blocksize-policy", "file", "{disk}",
      "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64k", "blocksize-error-policy=error"],
     ["python", str(VOLATILE), "file={disk}", "run={run}", "fua=no"]],
    ids=["file", "memory", "slow", "one-request", "block-sizes", "without-fua"],
)  # fmt: skip
@pytest.mark.parametrize("flush", ["none", "durable"])
def test_pages_beyond_ram_are_kept_by_any_server(
    serve: Serve, pools: Path, tmp_path: Path, plugin: list[str], flush: str
) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(SIZE)
    server = Remote(tmp_path, [part.format(disk=disk, run=tmp_path) for part in plugin]).start()
    try:
        far = Far(serve, pools, server, flush=flush)
        with far.server.client() as client:
            far.fill(client, 1)
            far.fill(client, 2)
            client.trim(PAGE * 8, FIRST * PAGE)
            client.flush()
            far.server.kill()
        far.server.start()
        with far.server.client() as client:
            assert client.pread(PAGE * 8, FIRST * PAGE) == bytes(PAGE * 8)
            client.pwrite(b"".join(incompressible(page, 2) for page in range(FIRST, FIRST + 8)), FIRST * PAGE)
            far.check(client, 2)
            with Control(far.pool) as control:
                assert control.request(Request.DRAIN) == 0
            far.check(client, 2)
            assert counters(far.pool).regions_set == 0
    finally:
        server.kill()


def test_our_own_device_is_another_ones_backing(serve: Serve, pools: Path, tmp_path: Path) -> None:
    near = serve(device("near", pools, SIZE, tmp_path / "near", 16 * MIB))
    server = Remote(tmp_path, [])  # only its URI
    server.uri = f"nbd+unix:///near?socket={near.socket}"
    far = Far(serve, pools, server)
    with far.server.client() as client:
        far.fill(client, 1)
        far.check(client, 1)
        assert counters(pools / "near.pool").pages_in_tmem > PAGES / 4


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_requests_wait_for_a_server_that_comes_back(serve: Serve, pools: Path, remote: Remote, how: str) -> None:
    far = Far(serve, pools, remote, timeout=60)
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        for first in range(FIRST, FIRST + PAGES, PAGES // 4 if how == "killed" else PAGES):
            if how == "killed":
                remote.kill()
            else:
                remote.tell("hang")
            before = far.state()
            reads = Reads(client, range(first, first + 16))
            if how == "killed":
                wait_until(lambda: far.state().is_away, "the loss to be noticed")
                remote.start()
            else:
                wait_until(partial(far.has_lost_more, before), "the connection to be given up")
                remote.untell("hang")
            assert reads.wait() == {page: incompressible(page, 1) for page in range(first, first + 16)}
        far.check(client, 1)
    assert far.state().repeats > 0
    assert far.state().time_outs == 0


def test_while_it_is_away_ram_is_served_and_what_needs_it_fails_in_time(far: Far) -> None:
    far.remote.tell("synced")
    with far.server.client() as client:
        far.fill(client, 1)
        trimmed = far.in_tmem()[:8]
        for page in trimmed:
            client.trim(PAGE, page * PAGE)
        far.remote.kill()
        wait_until(lambda: far.state().is_away, "the loss to be noticed")
        here = [page for page in far.in_tmem() if page not in trimmed]
        gone = next(page for page in range(FIRST, FIRST + PAGES) if page not in (*here, *trimmed))
        assert len(here) > PAGES / 4
        reads = Reads(client, [gone])
        for page in here:  # while that waits
            assert client.pread(PAGE, page * PAGE) == incompressible(page, 1)
            client.pwrite(incompressible(page, 2), page * PAGE)
        assert far.state().time_outs == 0
        with pytest.raises(nbd.Error, match="EIO"):
            reads.wait()
        wait_until(lambda: far.state().time_outs > 0, "that to be counted")
        far.remote.start()
        wait_until(lambda: not far.state().is_away, "the server to be back")
        for page in range(FIRST, FIRST + PAGES):
            if page not in (gone, *trimmed):
                assert client.pread(PAGE, page * PAGE) == incompressible(page, 2 if page in here else 1), page
    assert far.server.log().count("is away") == 1
    assert far.server.log().count("is back") == 1


def test_a_page_whose_write_had_no_answer_is_an_error_until_it_is_written(far: Far) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        with Control(far.pool) as control:
            control.frozen(True)
        far.remote.tell("hang")
        with pytest.raises(nbd.Error, match="EIO"):
            client.pwrite(incompressible(FIRST, 2), FIRST * PAGE)
        far.remote.untell("hang")  # it may come true now
        with pytest.raises(nbd.Error, match="EIO"):
            client.pread(PAGE, FIRST * PAGE)
        client.pwrite(incompressible(FIRST, 3), FIRST * PAGE)
        # No protocol orders what left by a connection that was given up: it may come true even after this write.
        with suppress(nbd.Error):
            assert client.pread(PAGE, FIRST * PAGE) == incompressible(FIRST, 3)


def test_errors_of_the_server_are_errors_at_once(far: Far) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        far.remote.tell("fail")
        with pytest.raises(nbd.Error, match="EIO"):
            client.pread(PAGE, FIRST * PAGE)
        far.remote.untell("fail")
        far.check(client, 1)
    assert far.state().losses == 0


def test_a_server_that_is_asked_to_end_is_waited_for(far: Far) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        far.remote.ask_to_end()
        reads = Reads(client, range(FIRST, FIRST + 16))
        wait_until(lambda: far.state().is_away, "the loss to be noticed")
        far.remote.start()
        assert reads.wait() == {page: incompressible(page, 1) for page in range(FIRST, FIRST + 16)}


@pytest.mark.parametrize("size", [SIZE - MIB, SIZE + MIB])
def test_a_server_that_comes_back_with_another_size_is_not_used(far: Far, size: int) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        far.remote.kill()
        far.remote.tell("size", str(size))
        far.remote.start()
        with pytest.raises(nbd.Error, match="EIO"):
            client.pread(PAGE, FIRST * PAGE)
        assert far.state().is_away
        far.remote.kill()
        far.remote.untell("size")
        far.remote.start()
        wait_until(lambda: not far.state().is_away, "the right server to be back")
        far.check(client, 1)


def test_what_a_server_forgets_is_written_again_or_an_error_and_never_old(far: Far) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0  # the server has version 1 for good
        far.fill(client, 2)
        client.cache(32 * PAGE, FIRST * PAGE)  # copies of what is in the file are in tmem as well
        here = far.in_tmem()
        far.remote.kill()
        far.remote.start()
        assert far.drain() in (0, errno.EAGAIN)
        assert far.drain() == 0
        forgotten = 0
        for page in range(FIRST, FIRST + PAGES):
            try:
                assert client.pread(PAGE, page * PAGE) == incompressible(page, 2), page
            except nbd.Error:
                assert page not in here
                forgotten += 1
        assert forgotten
        assert counters(far.pool).bad_checksums == 2 * forgotten
        far.server.kill()
        far.pool.unlink()  # the host dies
    far.server.start()
    with far.server.client() as client:
        for page in range(FIRST, FIRST + PAGES):
            with suppress(nbd.Error):
                assert client.pread(PAGE, page * PAGE) == incompressible(page, 2), page


def test_what_was_flushed_survives_a_server_that_forgets_and_the_death_of_both(
    serve: Serve, pools: Path, remote: Remote
) -> None:
    far = Far(serve, pools, remote, flush="durable")
    with far.server.client() as client:
        for version in 1, 2, 3:
            far.fill(client, version)
            client.flush()
            remote.kill()
            remote.start()
            far.check(client, version)
        far.server.kill()
        far.pool.unlink()
        remote.kill()
    remote.start()
    far.server.start()
    with far.server.client() as client:
        far.check(client, 3)


def test_flush_fails_while_nothing_is_known_and_works_again(serve: Serve, pools: Path, remote: Remote) -> None:
    far = Far(serve, pools, remote, flush="durable")
    with far.server.client() as client:
        far.fill(client, 1)
        remote.kill()
        with pytest.raises(nbd.Error, match="EIO"):
            client.pwrite(incompressible(FIRST, 2), FIRST * PAGE)
        remote.start()
        client.pwrite(incompressible(FIRST, 3), FIRST * PAGE)
        client.flush()
        assert client.pread(PAGE, FIRST * PAGE) == incompressible(FIRST, 3)
        assert not counters(far.pool).sync_failed


@pytest.mark.parametrize("fua", ["yes", "no"])
def test_a_disk_on_another_host_is_flushed_whatever_became_of_its_server(
    serve: Serve, pools: Path, tmp_path: Path, fua: str
) -> None:
    remote = volatile(tmp_path / "remote", SIZE, f"fua={fua}")
    try:
        parameters = cache_device("disk", pools, remote.start().uri, ROOM, write="through", timeout=TIMEOUT)
        server = serve(parameters)
        with server.client() as client:
            for version in 1, 2, 3:
                for page in range(64):
                    client.pwrite(incompressible(page, version), page * PAGE)
                client.flush()
                remote.kill()
                remote.start()
            server.kill()
        (pools / "disk.pool").unlink()
        server.start()
        with server.client() as client:
            for page in range(64):
                assert client.pread(PAGE, page * PAGE) == incompressible(page, 3), page
    finally:
        remote.kill()


def test_no_server_no_device_and_the_message_says_which(pools: Path, tmp_path: Path) -> None:
    parameters = device("far", pools, SIZE, f"nbd+unix:///?socket={tmp_path}/none", ROOM, bitmap=tmp_path / "map")
    command = nbdkit_command(tmp_path / "sock", parameters)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert ended.returncode
    assert f"nbd+unix:///?socket={tmp_path}/none: " in ended.stderr
    assert "No such file or directory" in ended.stderr
    assert not list(pools.iterdir())


@pytest.mark.parametrize("keys", [{}, {"flush": "durable"}, {"overflow": "{run}/overflow"}], ids=str)
def test_a_device_whose_process_died_is_served_from_ram_while_its_server_is_away(
    serve: Serve, pools: Path, remote: Remote, keys: dict[str, str]
) -> None:
    remote.tell("synced")
    far = Far(serve, pools, remote, **{key: value.format(run=remote.run) for key, value in keys.items()})
    with far.server.client() as client:
        far.fill(client, 1)
        here = far.in_tmem()
        assert len(here) > PAGES / 4
        for page in (trimmed := here[:8]):  # for what is written meanwhile
            client.trim(PAGE, page * PAGE)
        here = here[8:]
        remote.kill()
        far.server.kill()
    far.server.start()
    newest = {page: 1 for page in range(FIRST, FIRST + PAGES) if page not in trimmed}
    with far.server.client() as client:
        assert far.state().is_away
        for page in here:
            assert client.pread(PAGE, page * PAGE) == incompressible(page, 1)
        if "flush" not in keys:  # that one's writes need the server
            for page in here:
                client.pwrite(incompressible(page, 2), page * PAGE)
                newest[page] = 2
        far.server.kill()  # and once more
    far.server.start()
    with far.server.client() as client:
        remote.start()
        for page, version in newest.items():
            assert client.pread(PAGE, page * PAGE) == incompressible(page, version), page
        assert far.drain() == 0
        wait_until(lambda: far.server.log().count("is back") == 1, "that to be said")
    assert far.server.log().count("is away") == 2
    assert counters(far.pool).bad_checksums == 0


@pytest.mark.parametrize("size", [SIZE - MIB, SIZE + MIB])
def test_it_does_not_go_on_with_another_server(far: Far, size: int) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        assert far.drain() == 0
        far.remote.kill()
        far.server.kill()
    far.server.start()
    with far.server.client() as client:
        far.remote.tell("size", str(size))
        far.remote.start()
        with pytest.raises(nbd.Error, match="EIO"):
            client.pread(PAGE, FIRST * PAGE)
        assert "another export than before" in far.server.log()


@pytest.mark.parametrize("change", ["no pool", "another pool", "another server", "a tail"])
def test_a_device_of_which_only_the_server_has_all_waits_for_it(
    serve: Serve, pools: Path, remote: Remote, change: str
) -> None:
    bitmap = "inside" if change == "a tail" else remote.run / "map"
    parameters = device("far", pools, SIZE - MIB, remote.uri, ROOM, bitmap=bitmap, timeout=TIMEOUT)
    pool, server = pools / "far.pool", serve(parameters)
    server.kill()
    first = pool.read_bytes()
    if change in ("no pool", "another pool"):
        pool.unlink()
    if change == "another pool":  # than the one that was in use with the bitmap last
        server.start().kill()
        pool.write_bytes(first)
    if change == "another server":
        parameters = [word.replace("remote.sock", "other.sock") for word in parameters]
    remote.kill()
    said = refusal(remote.run, parameters)
    assert "No such file" in said or "Connection refused" in said
    assert pool.exists() == (change != "no pool")


def is_in_vain(command: str, far: Far) -> bool:
    """Whether tmemctl says at once that the server is away."""
    return cli.main([command, "far", f"--pools={far.pool.parent}"]) == cli_common.AWAY


@pytest.mark.parametrize("command", ["drain", "handover"])
def test_what_needs_all_in_the_file_does_not_wait_for_a_server_that_is_away(
    serve: Serve, pools: Path, remote: Remote, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.tell("synced")
    far = Far(serve, pools, remote, timeout=3600)
    with far.server.client() as client, ThreadPoolExecutor() as beside:
        far.fill(client, 1)
        remote.tell("hang")
        begun = beside.submit(is_in_vain, command, far)
        wait_until(lambda: len(far.asked()) > 0, "it to be asked for")
        remote.kill()
        assert begun.result()
        assert is_in_vain(command, far)
        assert f"{command} of far needs {remote.uri}, whose server has been away for " in capsys.readouterr().err
        remote.untell("hang")
        if command == "drain":
            drained = beside.submit(cli.main, [command, "far", "--wait", f"--pools={pools}"])
            wait_until(lambda: "waiting for it" in capsys.readouterr().err, "it to wait")
            remote.start()
            assert drained.result() == 0
        else:
            remote.start()
        wait_until(lambda: far.state().connections > 0, "the server to be back")
        wait_until(lambda: not far.asked(), "what was begun to be done")
        far.check(client, 1)


def test_nor_does_the_drain_of_a_device_that_nobody_serves(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    with far.server.client() as client:
        far.fill(client, 1)
        far.server.kill()
    far.remote.kill()
    assert is_in_vain("drain", far)
    assert "Connection refused" in capsys.readouterr().err
    far.remote.start()
    assert cli.main(["drain", "far", f"--pools={far.pool.parent}"]) == 0


@pytest.mark.parametrize("command", ["drain", "save --whole", "restore"])
def test_what_loses_its_server_midway_says_that_it_may_be_back(
    far: Far, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = offline._config
    monkeypatch.setattr(offline, "_config", lambda *arguments: replace(config(*arguments), timeout=0.5))

    def run(command: str) -> int:
        file = [] if command == "drain" else [str(tmp_path / "save")]
        return cli.main([*command.split(), "far", *file, f"--pools={far.pool.parent}"])

    with far.server.client() as client:
        far.fill(client, 1)
        far.server.kill()
    assert run("save --whole") == 0
    far.remote.tell("hang")
    assert run(command) == cli_common.AWAY
    assert "did not answer in time" in capsys.readouterr().err
    far.remote.untell("hang")
    assert run(command) == 0
    far.server.start()
    with far.server.client() as client:
        far.check(client, 1)


def test_maintenance_goes_on_while_it_is_away(serve: Serve, pools: Path, remote: Remote) -> None:
    remote.tell("synced")
    far = Far(serve, pools, remote, timeout=1000, watermark=0)
    with far.server.client() as client, Control(far.pool) as control:
        far.fill(client, 1)
        remote.kill()
        wait_until(lambda: far.state().is_away, "the loss to be noticed")
        used = counters(far.pool).used_bytes
        control.target(used // 2)
        for _ in range(3):  # a tick between any two of them
            assert control.request(Request.COMPACT) == 0
        here = far.in_tmem()
        assert len(here) > PAGES / 4
        assert client.pread(PAGE, here[0] * PAGE) == incompressible(here[0], 1)
        assert counters(far.pool).io_errors == 0
        remote.start()
        wait_until(lambda: counters(far.pool).used_bytes <= used // 2, "RAM to be given back")
        far.check(client, 1)


@pytest.mark.parametrize("bitmap", ["map", "inside"])
@pytest.mark.parametrize("how", ["hung", "killed"])
def test_closing_does_not_wait_for_what_is_fetched(
    serve: Serve, pools: Path, tmp_path: Path, bitmap: str, how: str
) -> None:
    with volatile(tmp_path / "remote", SIZE + MIB) as remote:
        bitmap = bitmap if bitmap == "inside" else f"{remote.run}/{bitmap}"
        far = Far(serve, pools, remote.start(), bitmap=bitmap, timeout=1000, prefetch="yes")
        with far.server.client() as client:
            far.fill(client, 1)
            assert far.drain() == 0
            for page in range(FIRST, FIRST + 32):
                client.pread(PAGE, page * PAGE)
            here = set(far.in_tmem())
            assert FIRST + 32 in here  # it was fetched ahead
            remote.tell("hang")
            for page in range(FIRST + 32, FIRST + PAGES):
                if page not in here:
                    break
                client.pread(PAGE, page * PAGE)  # from RAM; what comes next is being fetched
            if how == "killed":
                remote.kill()
        assert far.server.stop() == 0


def test_a_golden_image_of_another_host(serve: Serve, pools: Path, remote: Remote) -> None:
    with (remote.run / "disk").open("r+b") as image:
        image.seek(FIRST * PAGE)
        image.write(b"".join(incompressible(page, 1) for page in range(FIRST, FIRST + PAGES)))
    server = serve(cache_device("golden", pools, remote.uri, 8 * MIB, timeout=TIMEOUT))
    with server.client() as one, server.client() as two:
        for client in one, two, one:
            for page in range(FIRST, FIRST + PAGES):
                assert client.pread(PAGE, page * PAGE) == incompressible(page, 1)
        assert counters(pools / "golden.pool").gets > PAGES
        remote.kill()
        assert one.pread(PAGE, (FIRST + PAGES - 1) * PAGE) == incompressible(FIRST + PAGES - 1, 1)


def far_with_overflow(serve: Serve, pools: Path, remote: Remote, **keys: object) -> Far:
    return Far(serve, pools, remote, overflow=remote.run / "overflow", **keys)


@pytest.mark.parametrize("flush", ["none", "durable"])
def test_writes_go_to_the_overflow_file_while_it_is_away_and_back_afterwards(
    serve: Serve, pools: Path, remote: Remote, flush: str
) -> None:
    remote.tell("synced")
    far = far_with_overflow(serve, pools, remote, flush=flush)
    with far.server.client() as client:
        far.fill(client, 1)
        remote.kill()
        far.fill(client, 2)
        client.flush()
        far.check(client, 2)
        wait_until(lambda: far.state().overflow > PAGES / 4, "the file to be counted")
        far.server.kill()
    remote.start()
    remote.tell("hang")  # it is there, and cannot be written to
    far.server.start()
    with far.server.client() as client:
        remote.untell("hang")
        far.check(client, 2)
        wait_until(lambda: far.state().overflow == 0 and far.state().published > 0, "all to be written back")
        far.check(client, 2)
        assert (remote.run / "overflow").stat().st_blocks * 512 < MIB
        assert far.drain() == 0
        far.server.kill()
    far.pool.unlink()  # the host dies
    far.server.start()
    with far.server.client() as client:
        far.check(client, 2)
    assert counters(far.pool).bad_checksums == 0


def test_a_read_of_what_lies_in_ram_and_in_the_overflow_file_needs_no_server(
    serve: Serve, pools: Path, remote: Remote
) -> None:
    far = far_with_overflow(serve, pools, remote)
    versions = 1, 2, 1
    with far.server.client() as client, Control(far.pool) as control:
        remote.kill()
        for version in 1, 2:
            control.frozen(version == 1)
            for page, last in enumerate(versions, FIRST):
                if version == last:
                    client.pwrite(incompressible(page, version), page * PAGE)
        assert kinds(far.pool)[FIRST : FIRST + 3] == [Kind.FILE, Kind.TMEM, Kind.FILE]
        expected = b"".join(incompressible(page, last) for page, last in enumerate(versions, FIRST))
        assert client.pread(3 * PAGE, FIRST * PAGE) == expected


def test_a_write_does_not_wait_for_the_server_where_there_is_an_overflow_file(
    serve: Serve, pools: Path, remote: Remote
) -> None:
    far = far_with_overflow(serve, pools, remote, timeout=3600)
    with far.server.client() as client:
        far.fill(client, 1)
        remote.kill()
        far.fill(client, 2)


def test_pages_are_written_again_while_they_are_written_back(serve: Serve, pools: Path, remote: Remote) -> None:
    remote.tell("synced")
    far = far_with_overflow(serve, pools, remote)
    with far.server.client() as client:
        for version in range(1, 9, 2):
            far.fill(client, version)
            remote.kill()
            far.fill(client, version + 1)
            remote.start()
            while far.state().overflow or not far.state().connections:
                for page in random.Random(version).sample(range(FIRST, FIRST + PAGES), 16):
                    client.pwrite(incompressible(page, version + 1), page * PAGE)
                    assert client.pread(PAGE, page * PAGE) == incompressible(page, version + 1)
            far.check(client, version + 1)


def test_what_flush_acknowledged_in_the_overflow_file_survives_the_host(
    serve: Serve, pools: Path, remote: Remote
) -> None:
    far = far_with_overflow(serve, pools, remote, flush="durable")
    with far.server.client() as client:
        far.fill(client, 1)
        remote.kill()
        far.fill(client, 2)
        client.flush()
        far.server.kill()
    far.pool.unlink()
    remote.start()
    far.server.start()
    with far.server.client() as client:
        far.check(client, 2)


def test_the_device_is_not_served_without_what_its_overflow_file_holds(
    serve: Serve, pools: Path, remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.tell("synced")
    far = far_with_overflow(serve, pools, remote)
    far.server.kill()
    saved = tmp_path / "saved"
    assert cli.main(["save", "--whole", "far", str(saved), f"--pools={pools}"]) == 0
    far.server.start()
    with far.server.client() as client:
        far.fill(client, 1)
        remote.kill()
        far.fill(client, 2)
        far.server.kill()
    remote.start()
    file, other = remote.run / "overflow", tmp_path / "other"
    parameters = [word for word in far.server.parameters if not word.startswith("overflow=")]
    assert "pages are in this overflow file" in refusal(tmp_path, parameters)
    assert "pages are in this overflow file" in refusal(tmp_path, [*parameters, f"overflow={other}"])
    file.rename(other)
    assert "which is gone" in refusal(tmp_path, parameters)
    assert "which is gone" in refusal(tmp_path, far.server.parameters)  # and is not made anew
    other.rename(file)
    file.chmod(0o644)
    assert "chmod 600" in refusal(tmp_path, far.server.parameters)
    file.chmod(0o600)
    with file.open("r+b") as damaged:
        damaged.write(b"TMEMOVER\2")
    assert "version 2" in refusal(tmp_path, far.server.parameters)
    with file.open("r+b") as damaged:
        damaged.write(b"TMEMOVER\1")
    assert cli.main(["restore", "far", str(saved), "--force", f"--pools={pools}"]) == 1
    assert "pages are in this overflow file" in capsys.readouterr().err
    far.server.start()
    with far.server.client() as client:
        far.check(client, 2)
        wait_until(lambda: far.state().published > 0 and far.state().overflow == 0, "all to be written back")
        far.server.kill()
    far.server.parameters = parameters
    far.server.start()
    with far.server.client() as client:
        far.check(client, 2)


def refusal(run: Path, parameters: list[str]) -> str:
    """What nbdkit says that does not start."""
    command = nbdkit_command(run / "refused.sock", parameters)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert ended.returncode
    return ended.stderr


@pytest.mark.parametrize("key", ["right", "wrong"])
def test_a_server_that_speaks_tls_knows_who_may_come(serve: Serve, pools: Path, tmp_path: Path, key: str) -> None:
    for name, secret in ("theirs", "11" * 32), ("right", "11" * 32), ("wrong", "22" * 32):
        (tmp_path / name).write_text(f"web:{secret}\n")
    server = Remote(tmp_path, ["--tls=require", f"--tls-psk={tmp_path}/theirs", "memory", str(SIZE)]).start()
    server.uri = f"nbds+unix://web@/?socket={server.socket}&tls-psk-file={tmp_path / key}"
    try:
        if key == "wrong":
            parameters = device("far", pools, SIZE, server.uri, ROOM, bitmap=tmp_path / "map")
            assert "gnutls" in refusal(tmp_path, parameters)
            return
        far = Far(serve, pools, server)
        with far.server.client() as client:
            far.fill(client, 1)
            server.kill()  # with what it had in memory
            server.start()
            wait_until(lambda: far.state().connects > 4, "it to be connected again")
            far.fill(client, 2)
            far.check(client, 2)
    finally:
        server.kill()


def test_where_the_overflow_file_finds_no_room_writes_wait_for_the_server(
    serve: Serve, pools: Path, remote: Remote, tmp_path: Path
) -> None:
    remote.tell("synced")
    with mountable(tmp_path / "small") as small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256K", "small", small], check=True)
        far = Far(serve, pools, remote, overflow=small / "overflow", timeout=100)
        try:
            with far.server.client() as client, ThreadPoolExecutor() as beside:
                far.fill(client, 1)
                remote.kill()
                filled = beside.submit(far.fill, client, 2)
                wait_until(lambda: os.statvfs(small).f_bavail == 0, "no room to be left")
                remote.start()
                filled.result()
                far.check(client, 2)
        finally:
            far.server.kill()


def test_who_begins_without_room_for_what_the_server_lacks_says_that_this_is_away(
    serve: Serve, pools: Path, remote: Remote, tmp_path: Path
) -> None:
    with mountable(tmp_path / "small") as small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256K", "small", small], check=True)
        far = Far(serve, pools, remote, overflow=small / "overflow", flush="durable", timeout=0.5)
        try:
            with far.server.client() as client:
                far.fill(client, 1)
                remote.kill()
                with pytest.raises(nbd.Error):
                    far.fill(client, 2)
        finally:
            far.server.kill()
        assert f"{remote.uri}: the server that has its file did not" in refusal(tmp_path, far.server.parameters)
        remote.start()
        far.server.start()
        far.server.kill()
