# SPDX-License-Identifier: BSD-3-Clause
"""Look after guests on our devices: those that an I/O error paused are resumed, and each run of one has a name.

It asks once a second who runs and who is paused. Events would say so earlier, but not what happened while nobody
listened.
"""

from __future__ import annotations

import syslog
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from uuid import uuid4

import libvirt

from tmemd.libvirt.devices import is_served
from tmemd.libvirt.domain import NAMESPACE, Domain, DomainError, parse

_PERIOD: Final = 1.0  # seconds
_LONGEST: Final = 60.0  # seconds between two attempts at a guest that pauses again and again
_FORGOTTEN: Final = 300.0  # seconds after which a guest that was resumed counts as well


class Running(Protocol):
    """What we ask of a libvirt domain."""

    def name(self) -> str: ...
    def ID(self) -> int: ...  # noqa: N802  libvirt's
    def state(self) -> list[int]: ...
    def diskErrors(self) -> dict[str, int]: ...  # noqa: N802
    def XMLDesc(self) -> str: ...  # noqa: N802
    def resume(self) -> int: ...
    def setMetadata(self, type: int, metadata: str, key: str, uri: str, flags: int) -> int: ...  # noqa: A002, N802


@dataclass
class _Attempts:
    next: float = 0.0
    pause: float = _PERIOD  # seconds, until the next but one


@dataclass
class Watch:
    """What is known of guests that run."""

    is_served: Callable[[str, float], bool] = is_served
    say: Callable[[str], None] = syslog.syslog
    clock: Callable[[], float] = time.monotonic
    _attempts: dict[str, _Attempts] = field(default_factory=dict)
    _named: set[tuple[str, int]] = field(default_factory=set)  # libvirt gives each run of a domain another number

    def name_runs(self, active: Sequence[Running]) -> None:
        """Give a name to each run that has none from us: from it follows which save file is the newest.

        It is tried once: libvirt may wait half a minute for a domain that is busy.
        """
        runs = {(domain.name(), domain.ID()): domain for domain in active}
        for run in runs.keys() - self._named:
            self._try(self._name, runs[run])
        self._named = set(runs)

    def _name(self, domain: Running) -> None:
        if parse(domain.XMLDesc().encode()).devices:
            kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
            domain.setMetadata(kind, f"<run id='{uuid4().hex}'/>", "tmemd", NAMESPACE, flags)

    def look(self, paused: Sequence[Running]) -> None:
        """Resume those of these domains that can go on."""
        for domain in paused:
            attempts = self._due(domain.name())
            if attempts and not self._try(self._resume, domain):
                attempts.next, attempts.pause = self.clock() + attempts.pause, min(attempts.pause * 2, _LONGEST)

    def _try(self, act: Callable[[Running], Any], domain: Running) -> Any:
        """What that returns of the domain, if it can be done; what is wrong with one keeps others from nothing."""
        try:
            return act(domain)
        except (libvirt.libvirtError, DomainError) as error:
            self.say(f"{domain.name()}: {error}")
            return None

    def _resume(self, domain: Running) -> bool:
        """Whether the domain is to be looked at again soon, for nothing was done."""
        if domain.state() != [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]:
            return True
        devices = _to_blame(parse(domain.XMLDesc().encode()), domain.diskErrors())
        if not devices or not all(self.is_served(device, _PERIOD) for device in devices):
            return True
        domain.resume()
        self.say(
            f"resumed {domain.name()}, which an I/O error had paused: {', '.join(sorted(devices))} is served again"
        )
        return False

    def _due(self, name: str) -> _Attempts | None:
        """What was tried with that domain, if it is time to try again."""
        attempts, now = self._attempts.get(name), self.clock()
        if attempts is None or now > attempts.next + _FORGOTTEN:
            attempts = self._attempts[name] = _Attempts()
        return attempts if now >= attempts.next else None


def _to_blame(domain: Domain, errors: dict[str, int]) -> frozenset[str]:
    """Our devices whose disks had the errors; none if a disk of somebody else's had one, too."""
    if not errors.keys() <= domain.disks.keys():
        return frozenset()
    return frozenset().union(*(domain.disks[target] for target in errors))


def watch(uri: str) -> None:
    """Do so until interrupted; libvirt may come and go."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # which are raised as well
    watched, connection = Watch(), None
    while True:
        try:
            connection = connection or libvirt.open(uri)
            watched.name_runs(connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE))
            watched.look(connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PAUSED))
        except libvirt.libvirtError:
            connection = None
        time.sleep(_PERIOD)
