# SPDX-License-Identifier: BSD-3-Clause
"""Two hosts on this machine: each with a network, a tmemd, a tmpfs and a disk of its own, and a cable between them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import fakes, leftovers
from tests.support.harness import Server, device
from tests.support.leftovers import dying_with_us

PORT = 10809


def can_have_networks() -> bool:
    """Whether this user may make network namespaces here."""
    return bool(shutil.which("ip")) and subprocess.run(["unshare", "--net", "true"], check=False).returncode == 0


class Host:
    """A tmemd, and servers that `server` makes; all of it may die at once by `die`."""

    def __init__(self, ram: Path, disk: Path, address: str) -> None:
        """Have pools in *ram*, on a tmpfs, and files in *disk*; be called *address* (of 24 bits of network)."""
        self.ram, self.disk, self.address = ram, disk, address
        self.servers: list[Server] = []
        # It holds the network, which goes with it.
        self._holder = subprocess.Popen(
            dying_with_us(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]), stdout=subprocess.PIPE
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline(), "no network"
        self.inside = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--")
        self.run("ip", "link", "set", "lo", "up")
        self.tmemd: fakes.Tmemd | None = None

    def run(self, *command: str) -> str:
        """What a command prints that is run on this host."""
        return subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True).stdout

    def connect(self, other: Host) -> None:
        """Lay a cable to the *other* host."""
        ends = ("name", "eth0", "netns", str(self._holder.pid)), ("name", "eth0", "netns", str(other._holder.pid))
        self.run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in (self, other):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.link("up")

    def link(self, state: str) -> None:
        """Plug the cable in (`up`), or out (`down`)."""
        self.run("ip", "link", "set", "eth0", state)

    def start(self) -> None:
        """Start tmemd, and the servers that are not running."""
        self.tmemd = fakes.start_tmemd(self.ram, wrapper=self.inside)
        for server in self.servers:
            if not server.alive():
                server.start()

    def server(self, name: str, size: int, backing: object, *, tcp: bool = False, **keys: object) -> Server:
        """A server of one device, on port PORT or on a socket of its own, that has its RAM from this host's tmemd."""
        run = self.disk / f"run-{name}"
        run.mkdir()
        listen = ("--ipaddr", self.address, "--port", str(PORT)) if tcp else ()
        parameters = device(name, self.ram / "pools", size, backing, size, tmemd=self.ram / "socket", **keys)
        self.servers.append(Server(run, parameters, wrapper=self.inside, listen=listen))
        return self.servers[-1].start()

    def kill(self) -> None:
        """SIGKILL of tmemd and of all servers; what is in RAM stays."""
        for server in self.servers:
            server.kill()
        if self.tmemd:
            self.tmemd.stop(signal.SIGKILL)
            self.tmemd = None

    def die(self) -> None:
        """The same with what is in RAM."""
        self.kill()
        shutil.rmtree(self.ram)
        self.ram.mkdir(mode=0o700)

    def close(self) -> None:
        """End everything."""
        self.kill()
        self._holder.kill()
        self._holder.communicate()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them, for the length of a with block."""
    with contextlib.ExitStack() as undo:
        hosts = []
        for number in (1, 2):
            ram = undo.enter_context(leftovers.directory("/dev/shm")) / "ram"
            ram.mkdir(mode=0o700)
            disk = undo.enter_context(leftovers.directory("/var/tmp"))
            hosts.append(Host(ram, disk, f"10.0.0.{number}"))
            undo.callback(hosts[-1].close)
        hosts[0].connect(hosts[1])
        for host in hosts:
            host.start()
        yield hosts[0], hosts[1]
