# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.harness import wait_until
from tests.support.mounts import mountable
from tmemd.client import attach_pool
from tmemd.daemon.start import main
from tmemd.governor.host import total_memory
from tmemd.store.poolfile import PoolError
from tmemd.system import tmpfs


def capacity(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def test_tmpfs_is_told_from_disk(tmp_path: Path) -> None:
    assert tmpfs.is_tmpfs(Path("/dev/shm"))
    assert not tmpfs.is_tmpfs(Path("/proc"))
    with pytest.raises(OSError, match="No such file"):
        tmpfs.is_tmpfs(tmp_path / "nowhere")


def test_a_tmpfs_is_mounted_once_and_resized_after(tmp_path: Path) -> None:
    with mountable(tmp_path / "p o\\ols") as path:
        noswap = tmpfs.mount_tmpfs(path, str(8 << 20))
        assert tmpfs.is_tmpfs(path)
        assert path.stat().st_mode & 0o777 == 0o711
        (path / "web.pool").write_bytes(b"pages")
        assert tmpfs.mount_tmpfs(path, str(16 << 20)) == noswap
        assert capacity(path) == 16 << 20
        assert (path / "web.pool").read_bytes() == b"pages"


def test_mounts_own_words_are_the_error(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path, pytest.raises(OSError, match="pools"):
        tmpfs.mount_tmpfs(path, "nonsense")


def test_pools_survive_the_tmemd_that_mounted_their_tmpfs(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path:
        with fakes.tmemd(tmp_path, "--tmpfs-size=8M") as first, fakes.pool(path, "web", size=fakes.MIB):
            assert capacity(path) == 8 << 20
            first.stop()
        with fakes.tmemd(tmp_path, "--tmpfs-size=9M") as second:
            assert [status.name for status in second.client.pools()] == ["web"]
            assert capacity(path) == 9 << 20


def test_a_tmpfs_below_the_one_that_is_unmounted_is_no_place_for_pools(base: Path) -> None:
    with mountable(base / "pools") as path:
        mount = ["mount", "-t", "tmpfs", "-o", "mode=0711", "ours", str(path)]
        subprocess.run(mount, check=True)
        with fakes.tmemd(base, "--mounted") as running:
            unmount(path)
            wait_until(lambda: running.client.host().problems != [], "it to be noticed")
            assert "nothing is mounted there" in running.client.host().problems[0].words
            with pytest.raises(PoolError, match="its tmpfs was unmounted"):
                attach_pool(running.socket, running.attach("db"))
            subprocess.run(mount, check=True)
            wait_until(lambda: running.client.host().problems == [], "it to be noticed")


def test_what_others_mount_is_waited_for(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The directory is on a tmpfs, but on another one."""
    assert main(["--prepare", f"--pools={base}", "--mounted"]) == 1
    assert "nothing is mounted there" in caplog.text
    with mountable(base / "pools") as path:
        assert main(["--prepare", f"--pools={path}", "--tmpfs-size=8M"]) == 0
        assert main(["--prepare", f"--pools={path}", "--mounted"]) == 0


def test_prepare_mounts_and_ends(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path:
        assert main(["--prepare", f"--pools={path}", "--tmpfs-size=8M"]) == 0
        assert capacity(path) == 8 << 20
        assert main(["--prepare", f"--pools={path}", "--tmpfs-size=9M"]) == 0
        assert capacity(path) == 9 << 20


@pytest.mark.parametrize(
    ("config", "options", "size"),
    [
        ("", [], total_memory() // 2),
        ('[tmpfs]\nsize = "8M"', [], 8 << 20),
        ('[tmpfs]\nsize = "8M"', ["--tmpfs-size=9M"], 9 << 20),
        ("polcy = 3", [], total_memory() // 2),
    ],
)
def test_what_is_configured_gives_way_to_what_is_said_and_goes_before_half_of_ram(
    tmp_path: Path, config: str, options: list[str], size: int
) -> None:
    (tmp_path / "config").write_text(config)
    with mountable(tmp_path / "pools") as path:
        assert main(["--prepare", f"--pools={path}", f"--config={tmp_path}/config", *options]) == 0
        assert capacity(path) == pytest.approx(size, rel=0.01)


def test_a_tmpfs_that_is_configured_is_mounted_by_tmemd_too(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path, fakes.tmemd(tmp_path, config='[tmpfs]\nsize = "8M"'):
        assert capacity(path) == 8 << 20


@pytest.mark.parametrize("kept_out", [True, False])
def test_a_tmpfs_that_may_be_swapped_is_warned_of(
    kept_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mount_tmpfs = tmpfs.mount_tmpfs

    def mount(path: Path, size: str) -> bool:
        mount_tmpfs(path, size)
        return kept_out

    monkeypatch.setattr(tmpfs, "mount_tmpfs", mount)
    with mountable(tmp_path / "pools") as path:
        assert main(["--prepare", f"--pools={path}", "--tmpfs-size=8M"]) == 0
    assert ("cannot keep a tmpfs out of swap" in caplog.text) is not kept_out


def unmount(path: Path) -> None:
    """Although tmemd uses it."""
    assert subprocess.run(["umount", path], stderr=subprocess.DEVNULL, check=False).returncode, "it is in use"
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_tmpfs_that_is_unmounted_is_mounted_again(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path, fakes.tmemd(tmp_path, "--tmpfs-size=8M") as running:  # noqa: SIM117
        with fakes.pool(path, "web", size=fakes.MIB):
            assert len(running.client.pools()) == 1
            unmount(path)
            with pytest.raises(PoolError, match="its tmpfs was unmounted"):
                attach_pool(running.socket, running.attach("db"))
            assert list(path.iterdir()) == []
            wait_until(path.is_mount, "it to be mounted again")
            wait_until(lambda: running.client.pools() == [], "the pools there to be looked for")
            os.close(attach_pool(running.socket, running.attach("db"))[0])
            assert (path / "db.pool").exists()
            assert tmpfs.is_tmpfs(path / "db.pool")
            assert running.client.host().problems == []


def test_a_tmpfs_that_is_unmounted_and_not_ours_to_mount_is_waited_for(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "ours", path], check=True)
        with fakes.tmemd(tmp_path) as running:
            unmount(path)
            wait_until(lambda: running.client.host().problems != [], "it to be noticed")
            (problem,) = running.client.host().problems
            assert (problem.what, "not on tmpfs" in problem.words) == ("pools", True)
            with pytest.raises(PoolError, match="its tmpfs was unmounted"):
                attach_pool(running.socket, running.attach("db"))
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "ours", path], check=True)
            wait_until(lambda: running.client.host().problems == [], "it to be noticed")
            os.close(attach_pool(running.socket, running.attach("db"))[0])


def test_a_tmpfs_that_cannot_be_made_smaller_keeps_its_size(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path:
        with fakes.tmemd(tmp_path, "--tmpfs-size=8M") as first:
            first.stop()
        (path / "web.pool").write_bytes(bytes(4 << 20))
        with fakes.tmemd(tmp_path, "--tmpfs-size=1M") as second:
            assert [pool.unfinished for pool in second.client.pools()] == [True]
            assert capacity(path) == 8 << 20


@pytest.mark.parametrize("size", ["1%", "100%", "1"])
def test_any_part_of_ram_is_a_size(size: str, tmp_path: Path) -> None:
    (tmp_path / "tmemd.toml").touch()
    assert main(["--check-config", f"--config={tmp_path / 'tmemd.toml'}", f"--tmpfs-size={size}"]) == 0


@pytest.mark.parametrize("size", ["0", "0%", "101%", "%", "-1", "50 %", "lots"])
def test_bad_tmpfs_sizes_are_usage_errors(size: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main([f"--tmpfs-size={size}"])
    assert usage.value.code == 2
