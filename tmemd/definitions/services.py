# SPDX-License-Identifier: BSD-3-Clause
"""Who serves devices: systemd's units, or, where there is no systemd, processes of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.definitions.processes import Processes
from tmemd.definitions.systemd import Units
from tmemd.protocol import ServiceState


class Services(Protocol):
    """Servers of devices. What is called on one that is as it should be already does nothing. All raise PoolError."""

    survives: bool  # whether one that dies is started again

    def check(self, definition: Definition) -> None:
        """Raise PoolError where it could not serve the device."""

    def install(self, definition: Definition) -> None:
        """Let it be started, from now on at each boot as well."""

    def start(self, definition: Definition) -> None:
        """Begin to start it."""

    def stop(self, definition: Definition) -> None:
        """Have its server killed, and stay down; return when it is."""

    def restart(self, definition: Definition) -> None:
        """Kill the server that there is, and begin to start another."""

    def uninstall(self, name: str) -> None:
        """Stop it, and forget it."""

    def states(self, names: Sequence[str]) -> list[ServiceState]:
        """What each is."""

    def said(self, name: str) -> str:
        """Why it failed, in the last words of its server."""


def of(place: Place) -> Services:
    """Those of a host."""
    return Units(place) if place.has_systemd else Processes(place)
