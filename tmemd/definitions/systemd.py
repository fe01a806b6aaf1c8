# SPDX-License-Identifier: BSD-3-Clause
"""Devices served by systemd: tmemd-device@NAME.service behind tmemd-device@NAME.socket."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemd.definitions import accounts
from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.definitions.words import why
from tmemd.protocol import ServiceState
from tmemd.store.poolfile import PoolError

_STATES: Final[dict[str, ServiceState]] = {
    "active": "running",
    "activating": "starting",
    "reloading": "running",
    "inactive": "stopped",
}
_TCP: Final = ("nbd:", "nbds:")
_LINES: Final = 20  # of the journal: a failed start says no more
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # from the unit (ProtectHome=, PrivateTmp=)


def unit(name: str) -> str:
    """The service of a device."""
    return f"tmemd-device@{name}.service"


def socket_unit(name: str) -> str:
    """The socket of a device."""
    return f"tmemd-device@{name}.socket"


class Units:
    """The units of devices."""

    survives = True

    def __init__(self, place: Place) -> None:
        self._place = place

    def check(self, definition: Definition) -> None:
        """Raise PoolError where a file of the device is one that its unit cannot see."""
        for path in (definition.backing_path, definition.source_path):
            if path and (hidden := next((each for each in _HIDDEN if path.is_relative_to(each)), None)):
                raise PoolError(f"{path}: services see nothing of {hidden}: choose another place")

    def install(self, definition: Definition) -> None:
        """Let it be started, from now on at each boot as well."""
        needed, path = drop_in(definition, self._place), self._place.drop_in(definition.name)
        if needed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(needed)
        elif path.exists():
            _remove(path)
        _systemctl("daemon-reload")
        _systemctl("enable", "--quiet", unit(definition.name))

    def start(self, definition: Definition) -> None:
        """Begin to start it."""
        _systemctl("start", socket_unit(definition.name), unit(definition.name))

    def stop(self, definition: Definition) -> None:
        """Have its server killed, and stay down, whoever asks for a page: its socket is stopped first."""
        _systemctl("stop", socket_unit(definition.name), unit(definition.name))

    def restart(self, definition: Definition) -> None:
        """Kill the server that there is, and begin to start another, behind the same socket."""
        _systemctl("start", socket_unit(definition.name))
        _systemctl("restart", unit(definition.name))

    def uninstall(self, name: str) -> None:
        """Stop it, and forget it."""
        _systemctl("disable", "--quiet", "--now", unit(name), socket_unit(name))
        with suppress(PoolError):  # it is not there, or has not failed
            _systemctl("reset-failed", unit(name), socket_unit(name))
        self._place.socket(name).unlink(missing_ok=True)  # which systemd leaves
        if self._place.drop_in(name).exists():
            _remove(self._place.drop_in(name))
            _systemctl("daemon-reload")

    def states(self, names: Sequence[str]) -> list[ServiceState]:
        """What each is."""
        if not names:
            return []
        shown = _systemctl("show", "--property=ActiveState,SubState", *map(unit, names))
        return [_state(block) for block in shown.strip().split("\n\n")]

    def said(self, name: str) -> str:
        """Why it failed, in the last words of its server."""
        own = f"_SYSTEMD_UNIT={unit(name)}"  # without what systemd says of it
        subprocess.run(["journalctl", "--sync"], capture_output=True, check=False)  # what was said just now
        command = ["journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={_LINES}", own]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"{why(done.stdout)} (journalctl -u {unit(name)})"


def drop_in(definition: Definition, place: Place) -> str:
    """What the unit needs besides: to see files that lie elsewhere, and to have a disk."""
    lines = []
    if path := written(definition, place):
        if path.is_block_device():
            user = accounts.user_of(definition.name)
            disk = _escaped(path)
            lines += ["PrivateDevices=no", f"DeviceAllow={disk} rw", f"ExecStartPre=+/bin/chown {user} {disk}"]
        else:
            lines += [f"ReadWritePaths={_escaped(definition.own_directory or path)}"]
    elif definition.source_path and definition.source_path.is_block_device():
        lines += ["PrivateDevices=no", f"DeviceAllow={_escaped(definition.source_path)} r"]
    if definition.server and definition.server.startswith(_TCP):
        lines += ["PrivateNetwork=no", "RestrictAddressFamilies=AF_INET AF_INET6", "IPAddressDeny="]
    return "\n".join(["# Written by tmemctl create.", "[Service]", *lines, ""]) if lines else ""


def written(definition: Definition, place: Place) -> Path | None:
    """What the device writes to, but for what is in its own directory."""
    path = definition.source_path if definition.is_written_through else definition.backing_path
    return None if path is None or path.is_relative_to(place.home(definition.name)) else path


def _escaped(path: Path) -> str:
    """A path as a unit has it (systemd.syntax(7))."""
    text = str(path).replace("%", "%%")
    return text if re.fullmatch(r"[^\s\"'\\]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _remove(path: Path) -> None:
    path.unlink()
    with suppress(OSError):  # somebody has more there
        path.parent.rmdir()


def _state(block: str) -> ServiceState:
    properties = dict(line.split("=", 1) for line in block.splitlines())
    if properties["SubState"] == "auto-restart":
        return "failed"
    return _STATES.get(properties["ActiveState"], "failed")


def _systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PoolError(done.stderr.strip() or f"systemctl {' '.join(arguments)} failed")
    return done.stdout
