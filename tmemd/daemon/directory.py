# SPDX-License-Identifier: BSD-3-Clause
"""The directory of the pools: on a tmpfs, and nobody else's to write to."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Final

from tmemd.store.poolfile import PoolError
from tmemd.system import tmpfs

_log: Final = logging.getLogger("tmemd")


def prepare_directory(path: Path, size: str | None, *, mounted: bool = False) -> None:
    """Make *path* a place for pools: on a tmpfs of its own when *size* is given. Raises PoolError.

    *mounted*: others mount it, and until they have it is refused, even on a tmpfs.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o711)
        if size is not None:
            _mount(path, size)
        if not tmpfs.is_tmpfs(path):
            raise PoolError(f"{path} is not on tmpfs: mount one there, or say tmpfs.size in tmemd.toml (--tmpfs-size)")
        if mounted and not path.is_mount():
            raise PoolError(
                f"{path}: nothing is mounted there (--mounted); tmemd-pools.service does, where that is used"
            )
        _check_safe(path)
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or error}") from None


def _mount(path: Path, size: str) -> None:
    try:
        if not tmpfs.mount_tmpfs(path, size):
            _log.warning("%s: this kernel cannot keep a tmpfs out of swap (noswap, Linux 6.4)", path)
    except OSError as error:
        # A tmpfs that holds more than the new size cannot shrink; without tmemd its pools would never become smaller.
        if not path.is_mount():
            raise
        _log.warning("%s stays as large as it is: %s", path, str(error).partition("\n")[0])


def _check_safe(path: Path) -> None:
    """Let nobody else lock the directory, and raise PoolError where others could put what they like among pools."""
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()}:
        raise PoolError(f"{path} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PoolError(f"{path}: others may write to it: chmod go-w")
    # Who may read a directory can lock it.
    path.chmod(status.st_mode & ~(stat.S_IRGRP | stat.S_IROTH))
