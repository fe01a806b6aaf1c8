# SPDX-License-Identifier: BSD-3-Clause
"""The files of a device: planned, checked, made for its user, and taken away."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tmemd.definitions.accounts import Account
from tmemd.definitions.definition import NO_BACKING, Definition, load_all
from tmemd.definitions.place import Place
from tmemd.sizes import format_size
from tmemd.store.poolfile import PoolError


def plan(
    place: Place, name: str, *, size: str | None, backing: str | None, source: str | None, options: Sequence[str]
) -> Definition:
    """The definition of a device that is asked for in these words; *backing* may be a directory, for one in it."""
    if source:
        return Definition(name, source=str(Path(source).absolute()), options=tuple(options))
    if backing is None or backing == NO_BACKING:
        return Definition(name, size or "", backing or str(place.home(name) / "backing"), options=tuple(options))
    path = Path(backing).absolute()
    if path.is_dir():
        return Definition(name, size or "", str(path / name / "backing"), options=tuple(options))
    # Its user could make nothing beside it.
    bitmap = [] if any(option.startswith("bitmap=") for option in options) else [f"bitmap={place.home(name) / 'map'}"]
    return Definition(name, size or "", str(path), options=(*options, *bitmap))


def check(place: Place, definition: Definition) -> None:
    """Raise PoolError where a new device could not have its files, as far as that can be told before they are made."""
    _check_others(place, definition)
    home = place.home(definition.name)
    if home.exists() and any(home.iterdir()):
        raise PoolError(f"{home} holds the files of another device of that name: move them away")
    if definition.source:
        _check_source(Path(definition.source))
    elif path := definition.backing_path:
        _check_backing(path, definition)


def _check_others(place: Place, definition: Definition) -> None:
    """A file that is written is one device's."""
    for other in load_all(place):
        if other.name != definition.name:
            for path in set(_files(definition)) & set(_files(other)):
                if definition.backing or definition.is_written_through or other.backing or other.is_written_through:
                    raise PoolError(f"{path} is already device {other.name}'s")


def _files(definition: Definition) -> Iterator[Path]:
    for path in (definition.backing_path, definition.bitmap_path, definition.source and Path(definition.source)):
        if path:
            yield path.resolve()


def _check_source(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise PoolError(f"{path} is neither an image nor a disk")


def _check_backing(path: Path, definition: Definition) -> None:
    if path.is_block_device():
        return
    if path.exists() and not path.is_file():
        raise PoolError(f"{path} is neither a file, a directory nor a disk")
    if path.exists() and path.stat().st_size:
        raise PoolError(f"{path} holds something: say where a new file can be made, or move it away")
    directory = next(each for each in path.parents if each.exists())
    if path.parent.name != definition.name and directory != path.parent:
        raise PoolError(f"{path.parent}: no such directory")
    size, there = definition.size_bytes or 0, shutil.disk_usage(directory).free
    if size > there and definition.option("reserve") != "no":
        raise PoolError(
            f"{directory} has no room for {format_size(size)}, {format_size(there)} is free: choose another place"
            " (--backing), a smaller size, or reserve=no (a full disk then means failed writes)"
        )


def make(place: Place, definition: Definition, account: Account) -> None:
    """Make its directories and, elsewhere than in its own, its backing file; all of them its user's alone."""
    _make_directory(place.home(definition.name), account)
    path = definition.backing_path
    if path and not path.is_block_device() and not path.is_relative_to(place.home(definition.name)):
        if path.parent.name == definition.name:
            _make_directory(path.parent, account)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            os.chown(path, account.uid, account.gid)
    if definition.is_written_through and Path(definition.source).is_file():
        os.chown(definition.source, account.uid, -1)


def _make_directory(path: Path, account: Account) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    os.chown(path, account.uid, account.gid)


def check_access(definition: Definition, account: Account) -> None:
    """Raise PoolError where its user cannot read its source."""
    if definition.source and not Path(definition.source).is_block_device():
        done = subprocess.run(
            ["test", "-r", definition.source], check=False, user=account.uid, group=account.gid, extra_groups=[]
        )
        if done.returncode:
            raise PoolError(
                f"{definition.source}: its user, {account.name} of the group tmemd, may not read it: chgrp tmemd and"
                " chmod g+r it, and let the group into the directories above it (chmod g+x)"
            )


def remove(place: Place, definition: Definition, account: Account | None) -> None:
    """Take away what `make` made and the device wrote. Disks and sources stay, and are root's again."""
    path, bitmap = definition.backing_path, definition.bitmap_path
    for each in (path if path and not path.is_block_device() else None, bitmap, bitmap and Path(f"{bitmap}.new")):
        if each:
            each.unlink(missing_ok=True)
    if path and path.parent.name == definition.name:
        with suppress(OSError):  # there is more in it
            path.parent.rmdir()
    for kept in (path, definition.source and Path(definition.source)):
        if kept and account and kept.exists() and kept.stat().st_uid == account.uid:
            os.chown(kept, 0, -1)
    for directory in (place.home(definition.name), place.vhost_directory(definition.name)):
        if directory.exists():
            shutil.rmtree(directory)


def holds_data(path: Path | None) -> bool:
    """Whether anything was ever written to a backing file: blocks that are only reserved are none."""
    if path is None or not path.is_file():
        return False
    with open(path, "rb", buffering=0) as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError:
            return False
    return True
