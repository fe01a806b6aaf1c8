# SPDX-License-Identifier: BSD-3-Clause
"""libvirt's hook: what is done when a domain that uses our devices starts, ends, or is restored.

libvirt waits for it and holds the domain meanwhile, so that asking libvirt anything would wait for ever. A hook that
fails keeps a domain from being started or restored; at all other moments nothing may fail, and at a reconnect of
libvirtd a failure would even kill the guest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemd.libvirt import devices
from tmemd.libvirt.devices import DeviceError
from tmemd.libvirt.domain import Domain
from tmemd.libvirt.records import Guest, Record, RecordError, Records
from tmemd.protocol import PoolStatus

LOGS: Final = Path("/var/log/libvirt/qemu")
_TAIL: Final = 64 << 10  # bytes of a log: QEMU may have said something, too
# libvirt's own lines in a domain's log.
_SAID: Final = re.compile(rb"^\d{4}-\S+ \S+: (?:starting up|shutting down, reason=([a-z ]+)$)", re.MULTILINE)
# Why a domain ended, in libvirt's words; the guest's memory is gone, or somewhere else.
_ENDED: Final = ("shutdown", "destroyed", "crashed", "migrated", "from snapshot")


@dataclass(frozen=True)
class Hook:
    """The hook, and what it works on."""

    records: Records
    start: Callable[[str], None] = devices.start
    status: Callable[[str], PoolStatus | None] = devices.status
    drain_later: Callable[[], None] = devices.drain_later
    logs: Path = LOGS

    def run(self, name: str, operation: str, reason: str, domain: Domain) -> None:
        """Do what an operation on the domain of that name asks for. Raises DeviceError where that must not go on.

        *reason* is libvirt's extra argument: why it ended, since libvirt 10.5, or '-'.
        """
        match operation:
            case "prepare":
                for device in sorted(domain.devices):
                    self.start(device)
            case "restore":
                for device in sorted(domain.devices):
                    self._restore(device, name, domain)
            case "started":
                self._record(domain, "running")
            case "release":
                self._release(domain, reason if reason != "-" else logged_reason(self.logs, name))

    def _restore(self, device: str, name: str, domain: Domain) -> None:
        """Let a saved guest only go on with the pages that it left."""
        self.start(device)
        record = self._read(device)
        status = self.status(device)
        if record is None or _is_cache(status):
            return
        if wrong := _wrong(record, status, domain):
            raise DeviceError(
                f"{device}: {wrong}: what this save file's guest had swapped out is gone, and restored it would read"
                f" wrong pages. Start {name} afresh (virsh managedsave-remove {name}; virsh start {name}); if you know"
                f" better, remove {self.records.path(device)}"
            )

    def _read(self, device: str) -> Record | None:
        try:
            return self.records.read(device)
        except RecordError as error:
            raise DeviceError(f"{error}: remove it, if you are sure that no guest used {device} since") from None

    def _release(self, domain: Domain, reason: str) -> None:
        if reason == "failed":  # to start: the guest did nothing, and what was there is there
            return
        guest: Guest = "saved" if reason == "saved" else "ended" if reason in _ENDED else "unknown"
        self._record(domain, guest)
        if guest != "ended":
            self.drain_later()

    def _record(self, domain: Domain, guest: Guest) -> None:
        for device in sorted(domain.devices):
            status = self.status(device)
            if not _is_cache(status):  # which many use, and none has pages of its own in
                lost = status.counters.pages_lost if status else 0
                self.records.write(device, Record(domain.uuid, guest, lost, domain.run))


def _is_cache(status: PoolStatus | None) -> bool:
    return status is not None and status.kind == "ephemeral"


def _wrong(record: Record, status: PoolStatus | None, domain: Domain) -> str:
    """Why the device has not what a saved domain left there; '' if it has."""
    if record.domain != domain.uuid:
        return f"domain {record.domain} has used it since"
    if record.guest in ("running", "ended"):
        return "its guest has run since"
    if record.run and record.run != domain.run:
        return "its guest has run since, and was saved again"
    lost = status.counters.pages_lost - record.pages_lost if status else 0
    return f"{lost} of its pages were lost with the host" if lost > 0 else ""


def logged_reason(logs: Path, name: str) -> str:
    """Why a domain ended, as its log says (libvirt before 10.5 tells hooks nothing); 'unknown' if it does not."""
    try:
        with (logs / f"{name}.log").open("rb") as log:
            log.seek(max(log.seek(0, 2) - _TAIL, 0))
            said = _SAID.findall(log.read(_TAIL))
    except (OSError, ValueError):
        return "unknown"
    return said[-1].decode() or "unknown" if said else "unknown"
