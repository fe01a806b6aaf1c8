# SPDX-License-Identifier: BSD-3-Clause
"""The system user of each device, in the group of them all: one guest's server cannot read another's pages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from tmemd.definitions.place import Place
from tmemd.store.poolfile import PoolError

GROUP: Final = "tmemd"
QEMU_GROUP: Final = "kvm"  # whom libvirt runs QEMU as is in it on Debian
_UID, _GID = 2, 3  # fields of a line of /etc/passwd


class Account(NamedTuple):
    """A user and its group."""

    name: str
    uid: int
    gid: int


def user_of(device: str) -> str:
    """The name of a device's user."""
    return f"tmemd-{device}"


def find(place: Place, device: str) -> Account | None:
    """The account of a device, if there is one."""
    fields = _entry(place.below("etc/passwd"), user_of(device))
    return Account(fields[0], int(fields[_UID]), int(fields[_GID])) if fields else None


def make(place: Place, device: str) -> Account:
    """The account of a device, made if need be. Raises PoolError."""
    if _entry(place.below("etc/group"), GROUP) is None:
        _run(place, "groupadd", "--system", GROUP)
    if find(place, device) is None:
        _run(place, "useradd", "--system", "--gid", GROUP, "--no-create-home", "--home-dir", "/nonexistent",
             "--shell", "/usr/sbin/nologin", user_of(device))  # fmt: skip
    found = find(place, device)
    if found is None:
        raise PoolError(f"useradd made no user {user_of(device)} in {place.below('etc/passwd')}")
    return found


def remove(place: Place, device: str) -> None:
    """Take the account away, if there is one. Raises PoolError."""
    if find(place, device):
        _run(place, "userdel", "--force", user_of(device))


def rename(place: Place, old: str, new: str) -> None:
    """Give a device's account, if there is one, another device's name. Raises PoolError."""
    if find(place, old):
        _run(place, "usermod", "--login", user_of(new), user_of(old))


def qemu_gid(place: Place) -> int:
    """The group whose members reach devices' sockets; root's where there is none."""
    fields = _entry(place.below("etc/group"), QEMU_GROUP)
    return int(fields[2]) if fields else 0


def _entry(path: Path, name: str) -> list[str] | None:
    try:
        lines = path.read_text(errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return None
    return next((fields for fields in (line.split(":") for line in lines) if fields[0] == name), None)


def _run(place: Place, command: str, *arguments: str) -> None:
    prefix = [] if place.root == Path("/") else ["--prefix", str(place.root)]
    try:
        done = subprocess.run([command, *prefix, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PoolError(f"{command} is not installed (Debian: the package passwd)") from None
    if done.returncode:
        raise PoolError(done.stderr.strip() or f"{command} failed")
