# SPDX-License-Identifier: BSD-3-Clause
"""The files of a device: planned, checked, made for its user, and taken away."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tmemd.definitions.accounts import Account
from tmemd.definitions.definition import BACKING, NO_BACKING, Definition, load_all
from tmemd.definitions.place import Place
from tmemd.device.config import parse_place
from tmemd.sizes import format_size
from tmemd.store.poolfile import PoolError


def plan(
    place: Place, name: str, *, size: str | None, backing: str | None, source: str | None, options: Sequence[str]
) -> Definition:
    """The definition of a device that is asked for in these words; *backing* may be a directory, for one in it."""
    if source:
        return Definition(name, source=str(parse_place(source)), options=tuple(options))
    if backing is None or backing == NO_BACKING:
        return Definition(name, size or "", backing or str(place.home(name) / BACKING), options=tuple(options))
    path = parse_place(backing)
    if isinstance(path, Path) and path.is_dir():
        return Definition(name, size or "", str(path / name / BACKING), options=tuple(options))
    made = Definition(name, size or "", str(path), options=tuple(options))
    if made.has_tail or made.option("bitmap"):
        return made
    # Its user could make nothing beside it.
    return replace(made, options=(*options, f"bitmap={place.home(name) / 'map'}"))


def check(place: Place, definition: Definition) -> None:
    """Raise PoolError where a new device could not have its files, as far as that can be told before they are made."""
    _check_others(place, definition)
    for directory in (place.home(definition.name), definition.own_directory):
        if directory and directory.exists() and any(directory.iterdir()):
            raise PoolError(f"{directory} holds the files of another device of that name: move them away")
    if definition.bitmap_path and definition.bitmap_path.exists():
        raise PoolError(f"{definition.bitmap_path} is there already: the bitmap must be a new file")
    if source := definition.source_path:
        _check_source(source)
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
    for path in (definition.backing_path, definition.bitmap_path, definition.source_path):
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
    if definition.own_directory is None and directory != path.parent:
        raise PoolError(f"{path.parent}: no such directory")
    size, there = definition.size_bytes or 0, shutil.disk_usage(directory).free
    if size > there and definition.option("reserve") != "no":
        raise PoolError(
            f"{directory} has no room for {format_size(size)}, {format_size(there)} is free: choose another place"
            " (--backing), a smaller size, or reserve=no (a full disk then means failed writes)"
        )


def noted(definition: Definition) -> Definition:
    """The same device, which knows whose its source was before it became its user's, for it is to write to it."""
    source = definition.source_path
    if source and definition.is_written_through and source.is_file():
        return replace(definition, source_owner=str(source.stat().st_uid))
    return definition


def make(place: Place, definition: Definition, account: Account) -> None:
    """Make its directories and, elsewhere than in its own, its backing file; all of them its user's alone."""
    _make_directory(place.home(definition.name), account)
    path = definition.backing_path
    if path and not path.is_block_device() and not path.is_relative_to(place.home(definition.name)):
        if definition.own_directory:
            _make_directory(definition.own_directory, account)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            os.chown(path, account.uid, account.gid)
    if definition.source_owner:
        os.chown(definition.source, account.uid, -1)


def _make_directory(path: Path, account: Account) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    os.chown(path, account.uid, account.gid)


def check_access(definition: Definition, account: Account) -> None:
    """Raise PoolError where its user cannot do with its source what he is to."""
    source = definition.source_path
    if source is None or source.is_block_device():
        return
    flag, what = ("w", "write") if definition.is_written_through else ("r", "read")
    command = ["test", f"-{flag}", str(source)]
    if subprocess.run(command, check=False, user=account.uid, group=account.gid, extra_groups=[]).returncode:
        raise PoolError(
            f"{source}: {account.name}, of the group tmemd, may not {what} it: chgrp tmemd and chmod g+{flag} it, and"
            " let the group into the directories above it (chmod g+x)"
        )


def remove(place: Place, definition: Definition, account: Account | None) -> None:
    """Take away what `make` made and the device wrote. Disks and sources stay, and are again whose they were."""
    path, bitmap = definition.backing_path, definition.bitmap_path
    for each in (path if path and not path.is_block_device() else None, bitmap, bitmap and Path(f"{bitmap}.new")):
        if each:
            each.unlink(missing_ok=True)
    if definition.own_directory:
        with suppress(OSError):  # there is more in it
            definition.own_directory.rmdir()
    for kept in (path, definition.source_path):
        if kept and account and kept.exists() and kept.stat().st_uid == account.uid:
            os.chown(kept, int(definition.source_owner or 0), -1)
    for directory in (place.home(definition.name), place.vhost_directory(definition.name)):
        if directory.exists() and not (definition.source_path and definition.source_path.is_relative_to(directory)):
            shutil.rmtree(directory)


def renamed(place: Place, definition: Definition, name: str) -> Definition:
    """The same device by another name, with its files where they are to be then."""
    moved = dict(_moves(place, definition, name)) | {
        place.vhost_directory(definition.name): place.vhost_directory(name)
    }

    def rename(text: str) -> str:
        for old, new in moved.items():
            text = re.sub(rf"(^|=){re.escape(str(old))}(?=/)", rf"\g<1>{new}", text)
        return text

    options = tuple(map(rename, definition.options))
    return replace(definition, name=name, backing=rename(definition.backing), options=options)


def check_moves(place: Place, definition: Definition, wanted: Definition) -> None:
    """Raise PoolError where something else is where a device's directories are to be."""
    for old, new in _moves(place, definition, wanted.name):
        if old.exists() and new.exists():
            raise PoolError(f"{new} is there already: move it away")


def move(place: Place, definition: Definition, wanted: Definition) -> None:
    """Bring a device's directories to where another name has them; those that are there stay."""
    for old, new in _moves(place, definition, wanted.name):
        if old.exists():
            old.rename(new)
    if place.vhost_directory(definition.name).exists():
        shutil.rmtree(place.vhost_directory(definition.name))


def _moves(place: Place, definition: Definition, name: str) -> Iterator[tuple[Path, Path]]:
    yield place.home(definition.name), place.home(name)
    own = definition.own_directory
    if own and own != place.home(definition.name):
        yield own, own.with_name(name)


def holds_data(path: Path | None, start: int = 0, end: int = sys.maxsize) -> bool:
    """Whether these bytes of a backing file were ever written: those that are only reserved were not, a disk's were."""
    if path is None or not path.exists():
        return False
    if not path.is_file():
        return True
    with open(path, "rb", buffering=0) as file:
        try:
            return os.lseek(file.fileno(), start, os.SEEK_DATA) < end
        except OSError:
            return False
