# SPDX-License-Identifier: BSD-3-Clause
"""Who is at the other end of a connection, as far as the system tells."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_ESTABLISHED: Final = "01"
_ROOT: Final = Path("/")
_UCRED: Final = struct.Struct("iII")  # unix(7)


class Credentials(NamedTuple):
    """The process at the other end of a unix socket, as the kernel noted it when it connected."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Credentials:
        """Ask the kernel. Raises OSError."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Peer(NamedTuple):
    """Who made a connection: a process of this machine, or another machine."""

    identity: Hashable  # equal for connections of the same one; None: nobody can tell
    name: str  # for people

    def is_same(self, other: Peer) -> bool:
        """Whether the two are known to be one."""
        return self.identity is not None and self.identity == other.identity


def of_process(pid: int, root: Path = _ROOT) -> Peer:
    """The process that made a connection of a unix socket (SO_PEERCRED); 0 is one that our PID namespace lacks."""
    if pid <= 0:
        return Peer(None, "a process of another PID namespace")
    start = command = ""
    with suppress(OSError):
        # PID (COMMAND) STATE ..., the 22nd when it started, for numbers are used again; COMMAND can hold anything.
        before, _, after = (root / f"proc/{pid}/stat").read_text(errors="replace").rpartition(")")
        command, start = before.partition("(")[2], after.split()[19]
    name = command if command.isprintable() else ascii(command)
    return Peer(("process", pid, start), f"process {pid} ({name})" if name else f"process {pid}")


def of_address(sockaddr: bytes, root: Path = _ROOT) -> Peer:
    """Who made a TCP connection, by the struct sockaddr of its other end: another machine, or a process of this one.

    All processes here have the same address, so here it is who holds the other end. Where we may not see that, as
    other users' processes without being root, each connection is taken for one of its own.
    """
    family = int.from_bytes(sockaddr[:2], sys.byteorder)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return Peer(None, "a client of unknown address")
    packed, port = sockaddr[4:8] if family == socket.AF_INET else sockaddr[8:24], int.from_bytes(sockaddr[2:4], "big")
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    inodes = _inodes(address, port, root)
    if not inodes and not address.is_loopback:
        return Peer(("address", address), str(address))
    pids = _holders(inodes, root)
    return of_process(pids.pop(), root) if len(pids) == 1 else Peer(None, f"port {port} of {address}")


def _inodes(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, root: Path) -> set[str]:
    """The sockets of this machine that are connected and have that end."""
    mapped = bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed
    ends = {f"{_in_hex(packed)}:{port:04X}" for packed in (address.packed, mapped)}
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1] in ends and fields[3] == _ESTABLISHED:
                    found.add(fields[9])
    return found


def _in_hex(packed: bytes) -> str:
    """An address as /proc/net/tcp has it: words of 32 bits in the machine's own byte order."""
    return "".join(f"{word:08X}" for (word,) in struct.iter_unpack("=I", packed))


def _holders(inodes: set[str], root: Path) -> set[int]:
    """The processes that have one of these sockets open, of those that we may look at."""
    links = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for descriptors in (root / "proc").glob("[0-9]*/fd") if links else ():
        with suppress(OSError):
            if any(str(link.readlink()) in links for link in descriptors.iterdir()):
                found.add(int(descriptors.parent.name))
    return found
