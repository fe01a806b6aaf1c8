# SPDX-License-Identifier: BSD-3-Clause
"""Devices as the hook and the watch use them: started, looked at, drained."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from tmemd.client import Client
from tmemd.libvirt.domain import SOCKETS
from tmemd.protocol import DEFAULT_SOCKET, PoolStatus
from tmemd.store.poolfile import PoolError
from tmemd.system.greeting import greets

START_SECONDS: Final = 60.0  # a device that attaches to a big pool takes a second or two
_LOOK_SECONDS: Final = 1.0
_MOST_SAID: Final = 4096  # bytes, by what was run


class DeviceError(Exception):
    """A device that is not to be had, or not as it is needed; the message says which, why, and what to do."""


def is_served(device: str, seconds: float, sockets: Path = Path(SOCKETS)) -> bool:
    """Whether an NBD server greets at a device's socket within this time."""
    return greets(sockets / f"{device}.sock", seconds)


def start(device: str, sockets: Path = Path(SOCKETS)) -> None:
    """Start a device, or see that it runs, and return when its clients are served. Raises DeviceError.

    One that is served by hand is not started.
    """
    said = _tmemctl("start", device, timeout=START_SECONDS)
    if said and not is_served(device, _LOOK_SECONDS, sockets):
        raise DeviceError(said)


def status(device: str) -> PoolStatus | None:
    """What tmemd knows of a device's pool; None: nothing."""
    try:
        return Client.of_daemon(Path(os.environ.get("TMEMD_SOCKET") or DEFAULT_SOCKET)).pool(device)
    except PoolError:
        return None


def drain(device: str) -> str:
    """Move all that a device has in RAM to its file; returns what went wrong, '' for nothing."""
    return _tmemctl("drain", device)


def _tmemctl(command: str, device: str, timeout: float | None = None) -> str:
    """Have tmemctl do something with a device; returns what went wrong, '' for nothing."""
    words = ["tmemctl", command, "--", device]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"tmemctl {command} {device} is not done after {timeout:g} seconds"
    said = done.stderr[:_MOST_SAID].decode(errors="replace").strip()
    return (said or f"tmemctl {command} {device} failed") if done.returncode else ""


def drain_later() -> None:
    """Have what is kept drained by a process of its own: libvirt waits for all that has the hook's output."""
    subprocess.Popen(
        ["tmemd-libvirt", "drain"], cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
