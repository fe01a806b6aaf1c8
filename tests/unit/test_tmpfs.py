from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit import fakes
from tmemd.daemon.daemon import main
from tmemd.system import tmpfs


def capacity(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


@contextmanager
def mountable(path: Path) -> Iterator[Path]:
    """A directory that is unmounted again, or a skip where nothing can be mounted."""
    path.mkdir(exist_ok=True)
    probe = subprocess.run(["mount", "-t", "tmpfs", "probe", path], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"cannot mount here: {probe.stderr.strip()}")
    subprocess.run(["umount", path], check=True)
    try:
        yield path
    finally:
        while path.is_mount():
            subprocess.run(["umount", path], check=True)


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


def test_a_tmpfs_that_cannot_be_made_smaller_keeps_its_size(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path:
        with fakes.tmemd(tmp_path, "--tmpfs-size=8M") as first:
            first.stop()
        (path / "web.pool").write_bytes(bytes(4 << 20))
        with fakes.tmemd(tmp_path, "--tmpfs-size=1M") as second:
            assert second.client.pools() == []
            assert capacity(path) == 8 << 20


@pytest.mark.parametrize("size", ["0", "0%", "101%", "%", "-1", "50 %", "lots"])
def test_bad_tmpfs_sizes_are_usage_errors(size: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main([f"--tmpfs-size={size}"])
    assert usage.value.code == 2
