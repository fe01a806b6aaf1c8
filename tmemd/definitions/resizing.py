# SPDX-License-Identifier: BSD-3-Clause
"""Another size for a device whose pages are all in its file: what is in that beyond it, and its bitmap."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from tmemd.definitions import files
from tmemd.definitions.accounts import Account
from tmemd.definitions.definition import Definition
from tmemd.device.files import length
from tmemd.sizes import format_size
from tmemd.store import bitmapfile, poolindex
from tmemd.store.bitmapfile import BITS_OFFSET, BitmapHeader
from tmemd.store.pool import Pool
from tmemd.store.poolfile import PAGE, PoolError
from tmemd.store.poolindex import Kind, Run

_EMPTY: Final = {Kind.NOWHERE, Kind.ZERO}
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def check(found: Definition, pool: Path, size: int) -> None:
    """Raise PoolError where the device could not have that many bytes: for want of room, or for what it holds."""
    path, now = found.backing_path, _size_now(found)
    if size < now and not _is_empty_from(pool, path, size):
        raise PoolError(
            f"device {found.name} holds pages beyond {format_size(size)}: swapoff and blkdiscard it in its guest first"
        )
    if path is None or not path.exists():
        return
    if path.is_block_device():
        with open(path, "rb") as disk:
            there = length(disk.fileno())
        if size > there:
            raise PoolError(f"{path} has {format_size(there)}: enlarge it first")
    elif size - now > (free := shutil.disk_usage(path).free) and found.option("reserve") != "no":
        raise PoolError(f"{path.parent} has no room for {format_size(size - now)} more, {format_size(free)} is free")


def _size_now(found: Definition) -> int:
    """What its file is for, whatever somebody has written into its definition since."""
    bitmap = found.bitmap_path
    if bitmap is None or not bitmap.exists():
        return found.size_bytes or 0
    with open(bitmap, "rb", buffering=0) as file:
        return bitmapfile.read_header(file.fileno(), bitmap).size


def _is_empty_from(pool: Path, backing: Path | None, size: int) -> bool:
    """Whether nothing is behind the first *size* bytes: by the pool, and for what that has in the file, by the file."""
    if not pool.exists():
        return not files.holds_data(backing, size)
    with closing(Pool(pool)) as opened:
        identity = opened.finished()
        poolindex.check_layout(identity, pool)
        runs = list(poolindex.runs(opened.fd, identity))
    return all(_is_empty(run, backing, size) for run in runs if run.kind not in _EMPTY)


def _is_empty(run: Run, backing: Path | None, size: int) -> bool:
    start, end = max(run.start * PAGE, size), (run.start + run.count) * PAGE
    return end <= size or (run.kind == Kind.FILE and not files.holds_data(backing, start, end))


def resize(found: Definition, account: Account, size: int) -> None:
    """Give file and bitmap another size, as their user: whoever is killed meanwhile can begin again."""
    path, bitmap = found.backing_path, found.bitmap_path
    if path is None or bitmap is None or not bitmap.exists():
        return  # it was never served
    with _acting_as(account):
        with open(bitmap, "rb", buffering=0) as old:
            header = bitmapfile.read_header(old.fileno(), bitmap)
            if any(bitmapfile.read_bits(old.fileno(), header)):
                raise PoolError(f"{path} is not known to hold all of its pages ({bitmap}): drain it first")
        if size > header.size:
            _extend(path, header, size, reserve=found.option("reserve") != "no")
        _rewrite(bitmap, replace(header, size=size), was=header.regions, trusted=path.is_file())
        if size < header.size and path.is_file():
            os.truncate(path, -(-size // PAGE) * PAGE)


def _extend(path: Path, header: BitmapHeader, size: int, *, reserve: bool) -> None:
    """What is new reads as zeros, where it belongs to a region that is trusted."""
    is_disk = path.is_block_device()
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (0 if is_disk else os.O_NOFOLLOW))
    try:
        if is_disk:
            end = min(header.regions * header.region, size)
            os.pwrite(fd, bytes(end - header.size), header.size)
        elif reserve:
            os.posix_fallocate(fd, 0, -(-size // PAGE) * PAGE)
        else:
            os.ftruncate(fd, -(-size // PAGE) * PAGE)
        os.fsync(fd)
    finally:
        os.close(fd)


def _rewrite(path: Path, header: BitmapHeader, *, was: int, trusted: bool) -> None:
    """Put a bitmap in the place of the one that is there, whose first *was* bits are clear."""
    new = Path(f"{path}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, _NEW, 0o600)
    try:
        bits = (1 << header.regions) - 1 & ~((1 << was) - 1)
        size = header.file_bytes - BITS_OFFSET
        os.pwrite(fd, (0 if trusted else bits).to_bytes(size, "little"), BITS_OFFSET)
        bitmapfile.write_header(fd, header)
    finally:
        os.close(fd)
    new.rename(path)


@contextmanager
def _acting_as(account: Account) -> Iterator[None]:
    """In a directory that is a user's own, do nothing that he could not do himself."""
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
