# SPDX-License-Identifier: BSD-3-Clause
"""A host below a directory, with a tmemd and no systemd, on which devices are made by tmemctl."""

from __future__ import annotations

import os
import select
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import nbd
import pytest

from tests.support import fakes
from tests.support.content import PAGE, content
from tests.support.harness import connect, doors, wait_until
from tmemd.cli import main
from tmemd.client import Client
from tmemd.definitions import inventory
from tmemd.definitions.place import Place

GID = 64000


@contextmanager
def devicehost() -> Iterator[Place]:
    """It is what TMEMD_ROOT names for the length of a with block; all its devices are removed at the end."""
    with fakes.on_tmpfs() as base, pytest.MonkeyPatch.context() as environment:
        place = Place(base)
        for directory in (
            "etc/tmemd",
            "etc/systemd/system",
            "run/tmemd",
            "run/tmemd-devices",
            "var/log/tmemd-devices",
            "var/lib/tmemd-devices",
            "srv",
        ):
            place.below(directory).mkdir(parents=True)
        (place.runtime / ".lock").touch(0o600)
        for name in ("passwd", "shadow", "gshadow"):
            place.below(f"etc/{name}").touch()
        place.below("etc/group").write_text(f"tmemd:x:{GID}:\nkvm:x:{GID + 1}:\n")
        environment.setenv("TMEMD_ROOT", str(base))
        environment.setenv("TMEMD_SOCKET", str(place.tmemd))
        options = f"--socket={place.tmemd}", f"--group={GID}", f"--allow-group={GID}"
        with fakes.tmemd(place.below("run/tmemd"), *options):
            try:
                yield place
            finally:
                empty(place)


def empty(place: Place) -> None:
    """Remove all devices of a host, and what else tests have put there."""
    for device in inventory.devices(place):
        assert main(["remove", device.name, "--force"]) == 0
    for status in Client.of_daemon(place.tmemd).pools():
        Client.of_daemon(place.tmemd).destroy(status.name, lose_pages=True)
    for directory in (place.below("srv"), place.home("any").parent):
        shutil.rmtree(directory)
        directory.mkdir()


def left(place: Place) -> set[str]:
    """All that there is on the host, but for what tmemd keeps and copies of the files of accounts."""
    found = {str(path.relative_to(place.root)) for path in place.root.rglob("*")}
    accounts = place.below("etc/passwd").read_text().splitlines()
    return {path for path in found if not path.endswith("-") and "/state" not in path} | set(accounts)


def states(place: Place) -> dict[str, str]:
    """What each device is."""
    return {device.name: device.state for device in inventory.devices(place)}


def kill_server(place: Place, name: str) -> None:
    """SIGKILL a device's nbdkit, and wait for its end."""
    pid = Client.of_daemon(place.tmemd).pool(name).counters.pid
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [])
    finally:
        os.close(process)


@contextmanager
def client(place: Place, name: str) -> Iterator[nbd.NBD]:
    """A client of a device for the length of a with block, of whom the server knows that he has gone at its end."""
    handle = connect(place.socket(name), name)
    others = doors(place.pool(name)).nbd - 1
    yield handle
    handle.shutdown()
    wait_until(lambda: doors(place.pool(name)).nbd == others, "the client to be gone")


def write(place: Place, name: str, page: int, version: int = 1) -> None:
    """Have a client write a page of a device."""
    with client(place, name) as handle:
        handle.pwrite(content(page, version), page * PAGE)


def is_written(place: Place, name: str, page: int, version: int = 1) -> bool:
    """Whether a client finds that page."""
    with client(place, name) as handle:
        return bytes(handle.pread(PAGE, page * PAGE)) == content(page, version)
