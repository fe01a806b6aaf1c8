# SPDX-License-Identifier: BSD-3-Clause
"""A tmpfs for pools."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Final

_TMPFS_MAGIC: Final = 0x01021994
_OPTIONS: Final = "mode=0711,nosuid,nodev,noexec"


def is_tmpfs(path: Path) -> bool:
    """Whether *path* lies on tmpfs."""
    # Python's statvfs leaves out the type. The kernel's struct statfs begins with it and is at most 120 bytes long.
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(buffer).value == _TMPFS_MAGIC


def mount_tmpfs(path: Path, size: str) -> bool:
    """Mount a tmpfs of *size* (bytes or '50%') there, or resize the one that is mounted there already.

    Returns whether the kernel keeps it out of swap: pages of a pool that go to a swap device, perhaps the pool's own,
    are worse than pages never taken. Raises OSError with mount's own words.
    """
    if path.is_mount():
        _mount("remount", path, f"remount,size={size}")
        return "noswap" in _mount_options(path)
    try:
        _mount("tmpfs", path, f"{_OPTIONS},size={size},noswap")
    except OSError:  # Linux before 6.4 does not know noswap
        _mount("tmpfs", path, f"{_OPTIONS},size={size}")
        return False
    return True


def _mount(what: str, path: Path, options: str) -> None:
    device = [] if what == "remount" else ["-t", "tmpfs", "tmemd"]
    done = subprocess.run(["mount", *device, "-o", options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"mount {path} failed")


def _mount_options(path: Path) -> list[str]:
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        _, where, _, options, *_ = line.split()
        # The kernel writes blanks in paths as octal escapes.
        if where.encode().decode("unicode_escape") == str(path.resolve()):
            return options.split(",")
    return []
