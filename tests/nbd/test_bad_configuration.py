# SPDX-License-Identifier: BSD-3-Clause
"""Bad configuration: one clear line, a non-zero exit, and nothing on disk has changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, content
from tests.support.harness import DEADLINE, MIB, Serve, cache_device, device, environment, nbdkit_command
from tests.support.mounts import mountable
from tests.support.sources import image

GOOD = {"size": "4M", "limit": "8M"}


def snapshot(*directories: Path) -> dict[Path, tuple[object, ...]]:
    """Name, size, mode, time of change and content of everything below."""
    found: dict[Path, tuple[object, ...]] = {}
    for directory in directories:
        for path in [directory, *sorted(directory.rglob("*"))]:
            status = path.lstat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            changed = 0 if path.is_dir() else status.st_mtime_ns  # what came and went again does no harm
            found[path] = (status.st_size, status.st_mode, changed, status.st_blocks, digest)
    return found


def refused(parameters: list[str], *directories: Path) -> str:
    """Start nbdkit, which must end by itself without changing *directories*; returns its one line of complaint."""
    before = snapshot(*directories)
    with tempfile.TemporaryDirectory() as run:
        command = nbdkit_command(Path(run) / "sock", parameters)
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, env=environment(), check=False
        )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert snapshot(*directories) == before
    return lines[0]


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Where backing files of this test live, apart from sockets and logs."""
    directory = tmp_path / "stage"
    directory.mkdir()
    return directory


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"size": "0"}, "size"),
        ({"size": "-4096"}, "size"),
        ({"size": "1000"}, "512"),
        ({"size": "many"}, "size"),
        ({"size": "17T"}, "size"),
        ({"size": "99999999999999999999"}, "size"),
        ({"size": None}, "size"),
        ({"limit": "4k"}, "limit"),
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "lots"}, "limit"),
        ({"limit": None}, "limit"),
        ({"watermark": "51%"}, "watermark"),
        ({"watermark": "-1"}, "watermark"),
        ({"watermark": "some"}, "watermark"),
        ({"backing": None}, "backing"),
        ({"backing": ""}, "backing"),
        ({"backing": "/nonexistent/directory/file"}, "/nonexistent/directory"),
        ({"backing": "/proc"}, "/proc"),
        ({"backing": "/dev/null"}, "/dev/null"),
        ({"name": ""}, "name= is empty"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"lost": "maybe"}, "lost"),
        ({"flush": "sometimes"}, "flush"),
        ({"prefetch": "maybe"}, "prefetch=maybe is none of auto, no, yes"),
        ({"colour": "blue"}, "colour"),
        ({"pools": "/nonexistent/pools"}, "error: /nonexistent/pools: No such file or directory"),
        ({"bitmap": "/nonexistent/directory/map"}, "/nonexistent/directory"),
        ({"backing": "/nonexistent/a", "bitmap": "/nonexistent/a"}, "the same file"),
    ],
)
def test_a_bad_value_is_refused(pools: Path, stage: Path, keys: dict[str, str | None], hint: str) -> None:
    good: dict[str, object] = {"name": "bad", "backing": stage / "file", "pools": pools} | GOOD
    parameters = [f"{key}={value}" for key, value in (good | keys).items() if value is not None]
    assert hint in refused(parameters, pools, stage)


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"backing": "/nonexistent/file"}, "backing="),
        ({"backing": "none"}, "backing="),
        ({"size": "64k"}, "size="),
        ({"bitmap": "/nonexistent/map"}, "bitmap="),
        ({"flush": "durable"}, "flush=durable"),
        ({"lost": "zero"}, "lost="),
        ({"write": "yes"}, "write"),
        ({"limit": None}, "limit"),
        ({"limit": "4k"}, "limit"),
        ({"source": ""}, "source"),
        ({"source": "/nonexistent/file"}, "/nonexistent/file: No such file"),
        ({"source": "/dev/null"}, "/dev/null is neither"),
        ({"source": "/proc"}, "/proc is neither"),
    ],
)
def test_a_bad_value_of_a_cache_device_is_refused(
    pools: Path, stage: Path, keys: dict[str, str | None], hint: str
) -> None:
    good = {"name": "bad", "source": str(image(stage / "image", 16)), "limit": "8M", "pools": str(pools)}
    parameters = [f"{key}={value}" for key, value in (good | keys).items() if value is not None]
    assert hint in refused(parameters, pools, stage)


@pytest.mark.parametrize(("size", "hint"), [(0, "0 bytes"), (1, "1 bytes"), (4 * MIB + 511, "multiple of 512")])
def test_a_source_that_is_no_device_is_refused(pools: Path, stage: Path, size: int, hint: str) -> None:
    (stage / "image").write_bytes(bytes(size))
    assert hint in refused(cache_device("bad", pools, stage / "image", "8M"), pools, stage)


def test_writing_needs_a_source_that_can_be_written(pools: Path, stage: Path) -> None:
    with mountable(stage / "mounted") as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "image", directory], check=True)
        source = image(directory / "image", 16)
        subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
        assert "Read-only file system" in refused(
            cache_device("bad", pools, source, "8M", write="through"), pools, stage
        )


def test_write_is_for_sources(pools: Path, stage: Path) -> None:
    assert "write=" in refused(device("bad", pools, "4M", stage / "file", "8M", write="through"), pools, stage)


@pytest.mark.parametrize(("first", "second"), [("through", "through"), ("through", "no"), ("no", "through")])
def test_a_source_that_is_written_is_one_device_s_alone(
    serve: Serve, pools: Path, stage: Path, first: str, second: str
) -> None:
    source = image(stage / "image", 16)
    server = serve(cache_device("one", pools, source, "8M", write=first))
    os.kill(server.pid, signal.SIGSTOP)  # so that whatever changes is not its own maintenance's doing
    assert f"{source} is in use" in refused(cache_device("two", pools, source, "8M", write=second), pools, stage)


@pytest.mark.parametrize("write", ["no", "through"])
def test_a_swap_device_and_a_cache_device_share_no_file(serve: Serve, pools: Path, stage: Path, write: str) -> None:
    swap = serve(device("swap", pools, "4M", stage / "file", "8M"))
    os.kill(swap.pid, signal.SIGSTOP)
    assert "in use" in refused(cache_device("cache", pools, stage / "file", "8M", write=write), pools, stage)


@pytest.mark.parametrize(("old", "new"), [("swap", "cache"), ("cache", "swap")])
def test_a_pool_of_another_kind_is_refused(serve: Serve, pools: Path, stage: Path, old: str, new: str) -> None:
    parameters = {
        "swap": device("kind", pools, 16 * PAGE, stage / "file", "8M"),
        "cache": cache_device("kind", pools, image(stage / "image", 16), "8M"),
    }
    assert serve(parameters[old]).stop() == 0
    assert "the pool of another device" in refused(parameters[new], pools, stage)


def test_no_device_at_all_is_refused() -> None:
    assert "name" in refused([])


def test_a_key_before_the_first_name_is_refused(pools: Path, stage: Path) -> None:
    assert "name" in refused(["size=4M", *device("late", pools, "4M", stage / "file", "8M")], pools, stage)


def test_the_same_name_twice_is_refused(pools: Path, stage: Path) -> None:
    parameters = device("twin", pools, "4M", stage / "a", "8M") + device("twin", pools, "4M", stage / "b", "8M")
    assert "twin" in refused(parameters, pools, stage)


def test_the_same_backing_file_twice_is_refused(pools: Path, stage: Path) -> None:
    parameters = device("one", pools, "4M", stage / "a", "8M") + device("two", pools, "4M", stage / "a", "8M")
    assert str(stage / "a") in refused(parameters, pools, stage)


def test_a_key_given_twice_is_refused(pools: Path, stage: Path) -> None:
    assert "size" in refused([*device("bad", pools, "4M", stage / "a", "8M"), "size=8M"], pools, stage)


@pytest.mark.parametrize("mine", [b"precious data", bytes(PAGE) + b"late"])
def test_foreign_content_is_refused(pools: Path, stage: Path, mine: bytes) -> None:
    foreign = stage / "foreign"
    foreign.write_bytes(mine.ljust(4 * MIB, b"\0"))
    assert str(foreign) in refused(device("bad", pools, "4M", foreign, "8M"), pools, stage)


def test_a_size_beyond_the_block_device_is_refused(pools: Path, stage: Path, loop_device: Path) -> None:
    before = loop_device.read_bytes()
    parameters = device("bad", pools, "4M", loop_device, "8M", bitmap=stage / "map")
    assert str(loop_device) in refused(parameters, pools, stage)
    assert loop_device.read_bytes() == before


def test_a_block_device_can_be_the_backing(serve: Serve, pools: Path, stage: Path, loop_device: Path) -> None:
    server = serve(device("block", pools, "2M", loop_device, "1M", bitmap=stage / "map"))
    with server.client() as client:
        for page in range(512):
            client.pwrite(content(page, 1), page * PAGE)
        assert [n for n in range(512) if client.pread(PAGE, n * PAGE) != content(n, 1)] == []
    assert server.stop() == 0


def test_old_names_of_keys_are_taken_with_a_note(serve: Serve, pools: Path, stage: Path) -> None:
    server = serve(device("old", pools, "2M", stage / "file", "1M", map=stage / "bits", headroom="10%"))
    assert (stage / "bits").exists()
    for old, new in (("map", "bitmap"), ("headroom", "watermark")):
        assert f"{old}= is called {new}= now" in server.log()
    assert server.stop() == 0
    assert "twice" in refused([*device("bad", pools, "2M", stage / "file", "1M"), "bitmap=/a", "map=/a"])


@pytest.fixture
def used(serve: Serve, pools: Path, stage: Path) -> list[str]:
    """The parameters of a device that was in use and is not served now; its pool has pages in it."""
    parameters = device("used", pools, "4M", stage / "file", "8M")
    server = serve(parameters)
    with server.client() as client:
        for page in range(1, 100):
            client.pwrite(content(page, 1), page * PAGE)
    assert server.stop() == 0
    return parameters


def change(path: Path, offset: int, data: bytes) -> None:
    """Overwrite some bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


Damage = Callable[[Path, Path], None]


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        pytest.param(lambda pool, _: os.truncate(pool, 100), "truncated", id="pool cut inside its identity"),
        pytest.param(lambda pool, _: os.truncate(pool, 2 * PAGE), "truncated", id="pool cut behind its counters"),
        pytest.param(lambda pool, _: os.truncate(pool, pool.stat().st_size - 1), "truncated", id="pool one byte short"),
        pytest.param(
            lambda pool, _: change(pool, 8, struct.pack("<I", 99)), "version 99", id="pool of another version"
        ),
        pytest.param(lambda pool, _: change(pool, 0, b"NOTAPOOL"), "not a tmem pool", id="no pool"),
        pytest.param(lambda pool, _: change(pool, 16, b"\1"), "damaged", id="damaged identity"),
        pytest.param(lambda _, map_: change(map_, 0, b"NOTAMAP!"), ".map", id="no map"),
        pytest.param(lambda _, map_: change(map_, 8, struct.pack("<I", 99)), "version 99", id="map of another version"),
        pytest.param(lambda _, map_: change(map_, 16, b"\1"), ".map", id="damaged map"),
        pytest.param(lambda _, map_: os.truncate(map_, 100), ".map", id="truncated map"),
        pytest.param(lambda _, map_: map_.unlink(), "file", id="map gone"),
    ],
)
def test_damaged_pool_or_map_is_refused(used: list[str], pools: Path, stage: Path, damage: Damage, hint: str) -> None:
    damage(pools / "used.pool", stage / "file.map")
    assert hint in refused(used, pools, stage)


def test_a_pool_of_another_device_is_refused(used: list[str], pools: Path, stage: Path) -> None:
    assert used
    assert "used.pool" in refused(device("used", pools, "4M", stage / "other", "8M"), pools, stage)
    assert "size" in refused(device("used", pools, "2M", stage / "file", "8M"), pools, stage)


def test_a_map_of_another_device_is_refused(used: list[str], serve: Serve, pools: Path, stage: Path) -> None:
    other = serve(device("other", pools, "4M", stage / "other", "8M"))
    assert other.stop() == 0
    shutil.copy(stage / "other.map", stage / "file.map")
    assert "map" in refused(used, pools, stage)


def test_invariant_9_a_backing_file_or_pool_in_use_is_refused(serve: Serve, pools: Path, stage: Path) -> None:
    server = serve(device("busy", pools, "4M", stage / "file", "8M"))
    # Stopped, so that whatever changes is not its own maintenance's doing.
    os.kill(server.pid, signal.SIGSTOP)
    assert "in use" in refused(device("busy", pools, "4M", stage / "file", "8M"), pools, stage)
    assert "in use" in refused(device("other", pools, "4M", stage / "file", "8M"), pools, stage)
    os.kill(server.pid, signal.SIGCONT)
    with server.client() as client:
        client.pwrite(content(1, 1), PAGE)
        assert client.pread(PAGE, PAGE) == content(1, 1)


def test_invariant_9_a_pool_in_use_is_refused(serve: Serve, pools: Path) -> None:
    parameters = device("busy", pools, "4M", "none", "8M")
    server = serve(parameters)
    assert "busy" in refused(parameters)
    with server.client() as client:
        client.pwrite(content(1, 1), PAGE)
        assert client.pread(PAGE, PAGE) == content(1, 1)


def test_invariant_9_pool_backing_file_and_map_are_private(serve: Serve, pools: Path, stage: Path) -> None:
    serve(device("mine", pools, "4M", stage / "file", "8M"))
    for path in (pools / "mine.pool", stage / "file", stage / "file.map"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_invariant_9_a_new_pool_shows_nothing_of_an_old_one(serve: Serve, pools: Path, stage: Path) -> None:
    old = serve(device("old", pools, "4M", "none", "8M"))
    with old.client() as client:
        client.pwrite(b"secret" * 1000, 0)
    assert old.stop() == 0
    (pools / "old.pool").unlink()
    new = serve(device("new", pools, "4M", "none", "8M"))
    with new.client() as client:
        assert client.pread(4 * MIB, 0) == bytes(4 * MIB)
    assert b"secretsecret" not in (pools / "new.pool").read_bytes()
    assert not list(stage.iterdir())


def assert_content(client: nbd.NBD, pages: int) -> None:
    for page in range(1, pages):
        assert client.pread(PAGE, page * PAGE) == content(page, 1)


def test_a_pool_truncated_while_in_use_is_an_error_not_a_silent_end(serve: Serve, pools: Path, stage: Path) -> None:
    server = serve(device("cut", pools, "4M", stage / "file", "8M"))
    with server.client() as client:
        for page in range(1, 1000):
            client.pwrite(content(page, 1), page * PAGE)
        os.truncate(pools / "cut.pool", 16 * PAGE)
        with pytest.raises(nbd.Error):
            assert_content(client, 1000)
    assert "truncated" in server.log()


def test_a_directory_of_pools_that_was_made_in_vain_goes_again(stage: Path) -> None:
    assert "not on a tmpfs" in refused(device("web", stage / "pools", "4M", stage / "file", "8M"), stage)


def test_a_lease_outlasts_what_waits_for_the_server(pools: Path, tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    parameters = device("web", pools, "4M", uri, "8M", lease=20, timeout=10.1)
    assert "lease=20 is less than twice timeout=10.1: " in refused(parameters, pools)
    # It comes as far as looking for the server.
    assert "No such file" in refused([*parameters[:-1], "timeout=10"], pools)
