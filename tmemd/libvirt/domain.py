# SPDX-License-Identifier: BSD-3-Clause
"""A domain's XML: which of our devices it uses, and by which disk.

What libvirt hands out was written by whoever may define a domain, so it is bounded, and nothing is expanded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

MOST_XML: Final = 4 << 20  # bytes; a domain with a hundred disks has some 100 KiB
SOCKETS: Final = "/run/tmemd-devices"
NAMESPACE: Final = "https://tmemd.example/libvirt/1.0"  # of our element in a domain's metadata
# By NBD /run/tmemd-devices/NAME.sock, by virtio /run/tmemd-devices/NAME/vhost.sock; in arguments of QEMU more follows.
_SOCKET: Final = re.compile(rf"(?<![\w/.]){SOCKETS}/([a-z0-9][a-z0-9_-]{{0,24}})(?:/vhost)?\.sock(?![\w/.])")


class DomainError(Exception):
    """XML that is no domain's, or more than any has."""


@dataclass(frozen=True)
class Domain:
    """A domain as far as it concerns us."""

    uuid: str = ""
    devices: frozenset[str] = frozenset()  # by whatever way, arguments for QEMU included
    disks: dict[str, frozenset[str]] = field(default_factory=dict)  # devices by their disk's target: vdb
    run: str = ""  # what our element in its metadata says


def parse(xml: bytes) -> Domain:
    """What the XML says. Raises DomainError."""
    if len(xml) > MOST_XML:
        raise DomainError(f"the domain's XML has more than {MOST_XML} bytes")
    reader = _Reader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse_doctype  # and with it all entities
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, ValueError) as error:
        raise DomainError(f"the domain's XML cannot be read: {error}") from None
    return reader.domain()


def _refuse_doctype(*_: object) -> None:
    raise DomainError("the domain's XML has a document type, which libvirt's never has")


class _Reader:
    """What the parser found so far."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self._uuid = ""
        self._devices: set[str] = set()
        self._disks: dict[str, frozenset[str]] = {}
        self._disk: set[str] = set()  # devices of the disk that is being read
        self._target = ""
        self._run = ""

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        if self._path[1:2] == ["metadata"]:  # anybody's words
            if self._path[2:] == [f"{NAMESPACE} run"]:
                self._run = attributes.get("id", "")
            return
        found = {device for value in attributes.values() for device in _SOCKET.findall(value)}
        self._devices |= found
        if self._path[1:3] == ["devices", "disk"]:
            self._disk |= found
            if self._path[3:] == ["target"]:
                self._target = attributes.get("dev", "")

    def end(self, _: str) -> None:
        if self._path == ["domain", "devices", "disk"]:
            if self._disk:
                self._disks[self._target] = frozenset(self._disk)
            self._disk, self._target = set(), ""
        self._path.pop()

    def text(self, text: str) -> None:
        if self._path == ["domain", "uuid"]:
            self._uuid += text

    def domain(self) -> Domain:
        return Domain(self._uuid, frozenset(self._devices), self._disks, self._run)
