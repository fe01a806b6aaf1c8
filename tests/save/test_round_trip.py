# SPDX-License-Identifier: BSD-3-Clause
"""What is saved is what is restored: onto other hosts, other pools, other files; and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import leftovers, savefile
from tests.support.content import PAGE, content, incompressible
from tests.support.harness import MIB, Serve, cache_device, device
from tests.support.index import Kind, kinds, record_offset
from tests.support.mounts import mountable
from tests.support.reference import Reference
from tests.support.saving import PAGES, SIZE, Host, fill, read
from tmemd.binding import _core
from tmemd.cli import common, main
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import open_device
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError
from tmemd.system.replacing import replacing

Output = pytest.CaptureFixture[str]


@pytest.fixture
def host(pools: Path, tmp_path: Path) -> Host:
    """One with a device that is in use: some of its pages are in tmem, some in its file."""
    return Host(pools / "here", tmp_path / "web")


@pytest.fixture
def other(pools: Path, tmp_path: Path) -> Host:
    """Another, which lacks its file."""
    host = Host(pools / "there", tmp_path / "elsewhere", 2 * MIB)
    host.begin()
    return host


def save(host: Host, file: Path, *options: str) -> None:
    assert host.ctl("save", *options, "web", str(file)) == 0


def restore(host: Host, file: Path, *options: str) -> None:
    assert host.ctl("restore", *options, "web", str(file)) == 0
    assert host.ctl("check", "web") == 0


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "trim", "demote", "read"]),
        st.integers(0, PAGES - 1), st.integers(1, 40), st.booleans(),
    ),
    max_size=40,
)  # fmt: skip


def do(core: _core.Device, truth: Reference, version: int, request: tuple[str, int, int, bool]) -> None:
    what, page, n, odd = request
    offset = page * PAGE + 1024 * odd
    length = min(n * PAGE + 512 * odd, SIZE - offset)
    match what:
        case "write":
            data = b"".join(content(page + i, version) for i in range(n + 1))[:length]
            _core.pwrite(core, data, offset, 0)
            truth.write(offset, data)
        case "zero":
            _core.zero(core, length, offset, 0)
            truth.zero(offset, length)
        case "trim":
            whole = length // PAGE * PAGE if not odd else 0
            _core.trim(core, whole, page * PAGE, 0)
            truth.zero(page * PAGE, whole)
        case "demote":
            _core.Device.demote(core, n * PAGE)
        case "read":
            assert read(core, offset, length) == truth.read(offset, length)


@settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)
@given(REQUESTS, st.booleans(), st.sampled_from([1 * MIB, 2 * MIB, 16 * MIB]), st.booleans())
def test_a_device_is_what_it_was(
    requests: list[tuple[str, int, int, bool]], whole: bool, limit: int, durable: bool
) -> None:
    with leftovers.directory("/dev/shm") as place:
        host = Host(place / "here", place / "web", limit)
        host.durable(durable)
        truth = Reference(SIZE)
        with host.device() as core:
            for version, request in enumerate(requests, 1):
                do(core, truth, version, request)
        save(host, place / "file", *(["--whole"] if whole else []))
        others = [Host(place / "here", place / "web", 1 * MIB)]
        if whole:
            others = [Host(place / "there", place / "elsewhere", 2 * MIB), Host(place / "ram", None, 16 * MIB)]
            others[0].durable(not durable)
        for other in others:
            other.begin()
            restore(other, place / "file")
            assert other.content() == truth.whole()


def test_a_save_file_says_what_the_document_says(host: Host, tmp_path: Path) -> None:
    with host.device() as core:
        truth = fill(core)
    places = kinds(host.pool)
    save(host, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    header, _ = savefile.header(data)
    identity = poolfile.read_identity(os.open(host.pool, os.O_RDONLY), host.pool)
    assert identity
    assert {key: header[key] for key in ("name", "size", "uuid", "epoch", "whole")} == {
        "name": "web", "size": SIZE, "uuid": str(identity.uuid), "epoch": 1, "whole": False,
    }  # fmt: skip
    said = {page: record for record in savefile.records(data) for page in record.pages}
    on_disk = (tmp_path / "web").read_bytes()
    for page, kind in enumerate(places):
        record, is_now = said.get(page), truth.read(page * PAGE, PAGE if page < PAGES - 1 else 2048).ljust(PAGE, b"\0")
        if record is None or record.encoding == savefile.ZERO:
            assert kind in (Kind.NOWHERE, Kind.ZERO)
            assert is_now == bytes(PAGE)
        elif record.encoding == savefile.FILE:
            crc = int.from_bytes(record.payload[4 * (page - record.page) :][:4], "little")
            assert on_disk[page * PAGE :][:PAGE] == is_now
            assert crc == _core.crc32c(is_now)
        else:
            assert kind is Kind.TMEM
            assert record.content() == is_now
    assert {record.encoding for record in said.values()} >= {savefile.RAW, savefile.LZ4, savefile.SAME, savefile.FILE}


def test_whole_needs_no_file_and_goes_where_there_is_none(host: Host, other: Host, tmp_path: Path, pools: Path) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file", "--whole")
    (tmp_path / "web").unlink()
    (tmp_path / "web.map").unlink()
    ram = Host(pools / "ram", None, 16 * MIB)
    ram.begin()
    for each in (other, ram):
        restore(each, tmp_path / "file")
        assert each.content() == truth.whole()


def test_a_file_goes_along_with_its_device_and_no_other(
    host: Host, other: Host, tmp_path: Path, pools: Path, capsys: Output
) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file")
    for force in [], ["--force"]:
        assert other.ctl("restore", *force, "web", str(tmp_path / "file")) == 1
        assert "goes along with its backing file, and web has another" in capsys.readouterr().err
    assert other.content() == bytes(SIZE)
    moved = Host(pools / "moved", tmp_path / "moved", 1 * MIB)
    shutil.copy(tmp_path / "web", tmp_path / "moved")
    shutil.copy(tmp_path / "web.map", tmp_path / "moved.map")
    moved.begin()
    restore(moved, tmp_path / "file")
    assert moved.content() == truth.whole()


def test_what_the_file_lost_since_is_an_error_and_never_stale(host: Host, tmp_path: Path) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file")
    (page,) = [n for n, kind in enumerate(kinds(host.pool)) if kind is Kind.FILE and n > 200][:1]
    with open(tmp_path / "web", "r+b") as file:
        file.seek(page * PAGE)
        file.write(content(page, 12345))
    restore(host, tmp_path / "file")
    with host.device() as core:
        with pytest.raises(OSError, match="Input/output"):
            read(core, page * PAGE, PAGE)
        assert read(core, 0, page * PAGE) == truth.read(0, page * PAGE)


def test_after_a_reboot_a_device_is_what_it_was(host: Host, tmp_path: Path) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file")
    host.lose_pool()
    host.begin()
    restore(host, tmp_path / "file")
    assert host.content() == truth.whole()


def test_pages_of_which_no_checksum_is_known_are_in_the_file(host: Host, tmp_path: Path) -> None:
    with host.device() as core:
        truth = fill(core)
        core.drain()
    host.lose_pool()
    host.begin()
    save(host, tmp_path / "file")
    records = list(savefile.records((tmp_path / "file").read_bytes()))
    assert savefile.UNVERIFIED in {record.encoding for record in records}
    restore(host, tmp_path / "file")
    assert host.content() == truth.whole()


def test_what_has_changed_since_is_kept(host: Host, tmp_path: Path, capsys: Output) -> None:
    with host.device() as core:
        old = fill(core)
    save(host, tmp_path / "file", "--whole")
    changes: list[Callable[[_core.Device], None]] = [
        lambda core: _core.pwrite(core, b"new", 0, 0),
        lambda core: _core.zero(core, PAGE, 0, 0),
        lambda core: _core.trim(core, PAGE, 0, 0),
    ]
    for change in changes:
        with host.device() as core:
            change(core)
            now = read(core, 0, SIZE)
        assert host.ctl("restore", "web", str(tmp_path / "file")) == 1
        assert "web has changed since it was saved" in capsys.readouterr().err
        assert host.content() == now
    restore(host, tmp_path / "file", "--force")
    assert host.content() == old.whole()
    assert host.ctl("restore", "web", str(tmp_path / "file")) == 1  # what was restored is not what was saved then


def test_two_reboots_may_have_had_changes_between(host: Host, tmp_path: Path) -> None:
    host.begin()
    save(host, tmp_path / "file")
    for _ in range(2):
        host.lose_pool()
        host.begin()
    assert host.ctl("restore", "web", str(tmp_path / "file")) == 1


def test_another_device_is_not_restored_by_mistake(host: Host, pools: Path, tmp_path: Path, capsys: Output) -> None:
    host.begin()
    save(host, tmp_path / "file", "--whole")
    for name, size, words in ("db", SIZE, "device web was saved, not db"), ("big", 2 * SIZE, "and what was saved"):
        with closing(open_device(DeviceConfig(name, size, None, 32 * MIB, pools))):
            pass
        command = ["restore", name, str(tmp_path / "file"), f"--pools={pools}"]
        assert main(command) == 1
        assert words in capsys.readouterr().err
        assert main([*command, "--force"]) == (1 if name == "big" else 0)


def test_a_damaged_page_stays_one_and_is_named(host: Host, tmp_path: Path, capsys: Output) -> None:
    with host.device() as core:
        truth = fill(core)
    (page,) = [n for n, kind in enumerate(kinds(host.pool)) if kind is Kind.TMEM and n > 300][:1]
    with open(host.pool, "r+b") as pool:
        pool.seek(record_offset(host.pool, page) + 14)
        byte = pool.read(1)[0]
        pool.seek(-1, 1)
        pool.write(bytes([byte ^ 1]))
    for whole in [], ["--whole"]:
        save(host, tmp_path / "file", *whole)
        assert f"1 pages are damaged, the first of them page {page}" in capsys.readouterr().err
    restore(host, tmp_path / "file")
    with host.device() as core:
        with pytest.raises(OSError, match="Input/output"):
            read(core, page * PAGE, PAGE)
        assert read(core, 0, page * PAGE) == truth.read(0, page * PAGE)


def test_lost_pages_stay_lost_and_need_a_file(host: Host, pools: Path, tmp_path: Path, capsys: Output) -> None:
    with host.device() as core:
        fill(core)
    host.lose_pool()
    host.begin()
    save(host, tmp_path / "file", "--whole")
    ram = Host(pools / "ram", None, 16 * MIB)
    ram.begin()
    assert ram.ctl("restore", "web", str(tmp_path / "file")) == 1
    assert "page 129 cannot be restored: it was lost" in capsys.readouterr().err
    restore(host, tmp_path / "file")
    with host.device() as core, pytest.raises(OSError, match="Input/output"):
        read(core, 129 * PAGE, PAGE)


def test_a_pool_that_is_too_small_spills_and_without_a_file_refuses(
    host: Host, pools: Path, tmp_path: Path, capsys: Output
) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file", "--whole")
    tiny = Host(pools / "tiny", None, _core.layout(SIZE).minimum_bytes)
    tiny.begin()
    assert tiny.ctl("restore", "web", str(tmp_path / "file")) == 1
    assert "cannot be restored: Input/output error: give the pool more room" in capsys.readouterr().err
    with pytest.raises(PoolError, match="a restore of it was begun, and has not ended"):
        tiny.begin()
    assert tiny.ctl("list") == 0
    assert "half restored" in capsys.readouterr().out
    spilling = Host(pools / "spilling", tmp_path / "spilling", _core.layout(SIZE).minimum_bytes)
    spilling.begin()
    restore(spilling, tmp_path / "file")
    assert spilling.content() == truth.whole()


def test_a_full_tmpfs_refuses_and_spills_likewise(host: Host, tmp_path: Path, pools: Path) -> None:
    with host.device() as core:
        truth = fill(core)
    save(host, tmp_path / "file", "--whole")
    with mountable(pools / "small") as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", mounted], check=True)
        there = Host(mounted, tmp_path / "there")
        there.begin()
        restore(there, tmp_path / "file")
        assert there.content() == truth.whole()


def test_a_full_disk_leaves_what_was_there(host: Host, tmp_path: Path, capsys: Output) -> None:
    with host.device() as core:
        fill(core)
    with mountable(tmp_path / "full") as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "full", mounted], check=True)
        (mounted / "file").write_text("the one before")
        assert host.ctl("save", "web", str(mounted / "file")) == 1
        assert f"web cannot be saved in {mounted}/file: No space left on device" in capsys.readouterr().err
        assert [path.name for path in mounted.iterdir()] == ["file"]
        assert (mounted / "file").read_text() == "the one before"


def test_who_is_served_half_made_or_a_cache_is_told_what_to_do(
    serve: Serve, pools: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    cache = cache_device("cache", pools, tmp_path / "image", "2M")
    server = serve([*device("web", pools, SIZE, tmp_path / "web", "4M"), *cache])
    (pools / "new.pool").write_bytes(bytes(4 * PAGE))
    for command in "save", "restore":
        assert main([command, "web", str(tmp_path / "file"), f"--pools={pools}"]) == 1
        assert "is served" in capsys.readouterr().err
    server.kill()
    for name, words in ("new", "the pool is unfinished"), ("cache", "a cache device is not saved"):
        assert main(["save", name, str(tmp_path / "file"), f"--pools={pools}"]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "file").exists()
    assert main(["restore", "none", str(tmp_path / "file"), f"--pools={pools}"]) == 1
    assert "there is no pool none to restore to: start its device once" in capsys.readouterr().err


def test_streams_go_through_pipes(host: Host, other: Host) -> None:
    with host.device() as core:
        truth = fill(core)
    words = [sys.executable, "-m", "tmemd.cli"]
    with subprocess.Popen(
        [*words, "save", "--whole", f"--pools={host.pools}", "web", "-"], stdout=subprocess.PIPE
    ) as sender:
        subprocess.run([*words, "restore", f"--pools={other.pools}", "web", "-"], stdin=sender.stdout, check=True)
    assert sender.returncode == 0
    assert other.content() == truth.whole()


def test_json_says_what_was_done(host: Host, tmp_path: Path, capsys: Output) -> None:
    with host.device() as core:
        _core.pwrite(core, incompressible(200, 1), 200 * PAGE, 0)
    assert host.ctl("save", "--json", "web", str(tmp_path / "file")) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said == {"name": "web", "file": str(tmp_path / "file"), "bytes": (tmp_path / "file").stat().st_size,
                    "schema": common.SCHEMA, "whole": False, "pages": 1, "lost": 0}  # fmt: skip
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert host.ctl("restore", "--json", "web", str(tmp_path / "file")) == 0
    assert json.loads(capsys.readouterr().out)["pages_in_tmem"] == 1


def test_two_saves_to_one_file_do_not_meet(host: Host, tmp_path: Path, capsys: Output) -> None:
    host.begin()
    with replacing(tmp_path / "file") as fd:
        os.write(fd, b"somebody's")
        assert host.ctl("save", "web", str(tmp_path / "file")) == 1
        assert "another process is saving to it" in capsys.readouterr().err
    assert (tmp_path / "file").read_bytes() == b"somebody's"


@pytest.mark.parametrize("what", ["directory", "device"])
def test_what_is_no_file_is_not_replaced(host: Host, tmp_path: Path, capsys: Output, what: str) -> None:
    host.begin()
    target = tmp_path / "directory" if what == "directory" else Path("/dev/null")
    (tmp_path / "directory").mkdir()
    assert host.ctl("save", "web", str(target)) == 1
    assert "is there, and is no regular file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pool_of_one_gib_and_every_page_of_it(pools: Path, disks: Path) -> None:
    pages, run = 480_000, 64
    size = pages * PAGE
    here = DeviceConfig("web", size, disks / "here", 2 << 30, pools / "here", reserve=False)
    there = DeviceConfig("web", size, disks / "there", 600 * MIB, pools / "there", reserve=False)
    for each in here, there:
        assert each.pools
        each.pools.mkdir()

    def of(first: int) -> bytes:
        return b"".join(content(page, page + 1) for page in range(first, first + run))

    with closing(open_device(here)) as served:
        for first in range(0, pages, run):
            _core.pwrite(served.core, of(first), first * PAGE, 0)
    with closing(open_device(there)):
        pass
    assert (pools / "here" / "web.pool").stat().st_blocks * 512 > 900 * MIB
    assert main(["save", "--whole", f"--pools={here.pools}", "web", str(disks / "file")]) == 0
    (pools / "here" / "web.pool").unlink()
    assert main(["restore", f"--pools={there.pools}", "web", str(disks / "file")]) == 0
    with closing(open_device(there)) as served:
        assert [
            first for first in range(0, pages, run) if read(served.core, first * PAGE, run * PAGE) != of(first)
        ] == []


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_root_saves_and_restores_what_is_a_users(tmp_path: Path) -> None:
    with leftovers.directory("/dev/shm") as place:
        place.chmod(0o755)
        host = Host(place / "here", None, 16 * MIB)
        host.pools.chmod(0o755)
        with host.device() as core:
            truth = fill(core)
        os.chown(host.pool, NOBODY, NOBODY)
        save(host, tmp_path / "file")
        assert (tmp_path / "file").stat().st_uid == 0
        os.chown(host.pool, 0, 0)
        with host.device() as core:
            fill(core, seed=2)
        os.chown(host.pool, NOBODY, NOBODY)
        assert host.ctl("restore", "web", str(tmp_path / "file")) == 1
        assert host.ctl("restore", "--force", "web", str(tmp_path / "file")) == 0
        assert host.pool.stat().st_uid == NOBODY
        os.chown(host.pool, 0, 0)
        assert host.content() == truth.whole()
