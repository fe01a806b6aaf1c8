# SPDX-License-Identifier: BSD-3-Clause
"""A guest that swaps moves from host to host while it runs: QEMUs, servers with pools of their own, and one backing.

Each host is a directory here. MIGRATIONS=10 has it move ten times.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.harness import DEADLINE, MIB, ROOT, Server, counters, device, wait_until
from tests.support.leftovers import all_dying_with_us, dying_with_us
from tests.support.qemu import KERNELS, Monitor, make_initrd, needs_qemu
from tmemd.cli import main

MIGRATIONS = int(os.environ.get("MIGRATIONS", "1"))
SIZE = 512 * MIB
MEMORY = 128  # MiB of a guest
WORKLOAD, WORKLOAD_DURABLE = 110, 100  # MiB: of what swaps to a disk a round takes longer
LIMIT = 8 * MIB  # some pages are in RAM, some in the backing
LEASE, TIMEOUT = 12, 4  # seconds

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200), *needs_qemu]


class Backing:
    """What both hosts reach: a disk that an NBD server exports, which notes who writes to it."""

    def __init__(self, directory: Path) -> None:
        self._socket, self._log = directory / "disk.sock", directory / "disk.log"
        with (directory / "disk").open("wb") as disk:
            disk.truncate(SIZE + 16 * MIB)
        file = ["file", str(directory / "disk"), f"logfile={self._log}"]
        command = ["nbdkit", "-f", "-U", str(self._socket), "--filter=log", *file]
        self._process = subprocess.Popen(dying_with_us(command))
        wait_until(self._socket.exists, "the disk's server")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def uri(self, whose: str) -> str:
        """For one who is told apart by that name."""
        return f"nbd+unix:///{whose}?socket={self._socket}"

    def writers(self) -> list[str]:
        """Who has written pages, one after the other; each once if there were never two at a time."""
        log = self._log.read_text()
        names = dict(re.findall(r"connection=(\d+) Connect export=[\"']?(\w*)", log))
        writes = re.findall(r"connection=(\d+) (?:Write|Zero|Trim) id=\d+ offset=(0x[0-9a-f]+)", log)
        return [name for name, _ in groupby(names[number] for number, at in writes if int(at, 16) < SIZE)]


class Host:
    """A host that serves the device and runs the guest, or is about to."""

    def __init__(self, place: Path, pools: Path, name: str, backing: Backing, *, durable: bool) -> None:
        self.name, self.place = name, place / name
        self.place.mkdir()
        self.pools = pools / name
        self.pools.mkdir()
        keys = {"lease": LEASE, "timeout": TIMEOUT, "standby": "yes", "flush": "durable" if durable else "none"}
        parameters = device("web", self.pools, SIZE, backing.uri(name), LIMIT, warm=place / "hot", **keys)
        self.server = Server(self.place, parameters).start()
        self._incoming = self.place / "incoming"
        self._guest: subprocess.Popen[bytes] | None = None
        self.console = self.place / "console"
        self.monitor: Monitor

    def run(self, initrd: Path, workload: int, *, waits: bool) -> None:
        """Boot the guest, or wait for it to come."""
        # What docs/guests.md has one say.
        disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={self.server.socket},export=web"
        command: list[str | Path] = [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", str(MEMORY), "-nodefaults", "-display", "none",
            "-no-reboot", "-kernel", KERNELS[-1], "-initrd", initrd,
            "-append", f"console=ttyS0 quiet nowatchdog panic=-1 mib={workload}",
            "-serial", f"file:{self.console}", "-qmp", f"unix:{self.place}/monitor,server=on,wait=off",
            "-blockdev", f"{disk},discard=unmap,reconnect-delay=60", "-device", "virtio-blk-pci,drive=disk",
            *(["-incoming", f"unix:{self._incoming}"] if waits else []),
        ]  # fmt: skip
        self._guest = subprocess.Popen(all_dying_with_us(command), stdin=subprocess.DEVNULL)
        self.monitor = Monitor(self.place / "monitor")

    def rounds(self) -> int:
        """How many rounds of its work the guest says it has done. AssertionError when a page was wrong."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        assert not re.search("failed|WRONG|panic|I/O error", text), text
        return max(map(int, re.findall(r"guest: (\d+) rounds done", text)), default=0)

    def goes_on(self) -> None:
        """Return when the guest has done what it began after now: written all its pages, and found them right."""
        last = self.rounds()
        wait_until(lambda: self.rounds() > max(last, 1), f"a round on host {self.name}")
        assert re.search(r"MiB verified, [1-9]\d* MiB came back from swap, 0 pages wrong", self.console.read_text())

    def tmemctl(self, *command: str) -> int:
        """On this host."""
        return main([*command, "web", f"--pools={self.pools}"])

    def send(self, to: Host, *, bandwidth: int = 1 << 30) -> None:
        """Begin to send the guest."""
        self.monitor.run("migrate-set-parameters", **{"downtime-limit": 1000, "max-bandwidth": bandwidth})
        self.monitor.run("migrate", uri=f"unix:{to._incoming}")

    def await_migration(self, *ends: str) -> None:
        """Return when it has come to one of these."""
        end = time.monotonic() + DEADLINE
        while (status := self.monitor.run("query-migrate").get("status")) not in ends:
            assert time.monotonic() < end, status
            assert status not in ("failed", "cancelled"), status
            time.sleep(0.05)

    def end_guest(self) -> None:
        """SIGKILL for QEMU."""
        if self._guest:
            self._guest.kill()
            self._guest.wait()

    def end(self) -> None:
        """SIGKILL for all of the host."""
        self.end_guest()
        self.server.kill()


class Cluster:
    """Hosts, one after the other, that serve one device."""

    def __init__(self, place: Path, pools: Path, *, durable: bool) -> None:
        self._place, self._pools, self._durable = place, pools, durable
        self.initrd = make_initrd(place, "migration/init", ROOT / "build" / "hog")
        self.backing = Backing(place)
        self._hosts: list[Host] = []

    def close(self) -> None:
        """End them all."""
        for host in self._hosts:
            host.end()
        self.backing.close()

    def host(self, *, waits: bool) -> Host:
        """One more, with a guest that boots there, or that may come."""
        host = Host(self._place, self._pools, f"host{len(self._hosts)}", self.backing, durable=self._durable)
        self._hosts.append(host)
        host.run(self.initrd, WORKLOAD_DURABLE if self._durable else WORKLOAD, waits=waits)
        return host

    def prepare(self, source: Host) -> None:
        """From now on what a FLUSH acknowledges is in the backing, and who comes next knows what is hot."""
        if not self._durable:
            assert source.tmemctl("handover") == 0
        with redirect_stdout(StringIO()) as printed:
            assert source.tmemctl("hot") == 0
        (self._place / "hot").write_text(printed.getvalue())

    def stay(self, source: Host) -> None:
        """It stays here after all."""
        if not self._durable:
            assert source.tmemctl("handover", "--cancel") == 0


@contextmanager
def cluster_of(place: Path, pools: Path, *, durable: bool) -> Iterator[Cluster]:
    """For the length of a with block."""
    with ExitStack() as stack:
        cluster = Cluster(place, pools, durable=durable)
        stack.callback(cluster.close)
        yield cluster


def aborted(cluster: Cluster, source: Host) -> None:
    """A migration is taken back while it runs: the guest stays."""
    there = cluster.host(waits=True)
    cluster.prepare(source)
    source.send(there, bandwidth=MIB)
    source.await_migration("active")
    source.monitor.run("migrate_cancel")
    wait_until(lambda: source.monitor.run("query-migrate")["status"] == "cancelled", "the end of the migration")
    there.end()
    cluster.stay(source)
    source.goes_on()


def destination_killed(cluster: Cluster, source: Host) -> None:
    """The host that it is sent to dies amid it: the guest stays."""
    there = cluster.host(waits=True)
    cluster.prepare(source)
    source.send(there, bandwidth=MIB)
    source.await_migration("active")
    there.end()
    wait_until(lambda: source.monitor.run("query-migrate")["status"] == "failed", "the end of the migration")
    source.goes_on()  # though it writes through still


def moved(cluster: Cluster, source: Host) -> Host:
    """It moves, while the server at the source is killed and comes back; then that host is switched off in order."""
    there = cluster.host(waits=True)
    cluster.prepare(source)
    source.send(there)
    source.server.kill()
    source.server.start()
    source.await_migration("completed")
    there.goes_on()
    source.end()
    return there


def source_killed(cluster: Cluster, source: Host) -> Host:
    """It moves, and the host that it leaves dies in the same moment."""
    there = cluster.host(waits=True)
    cluster.prepare(source)
    source.send(there)
    source.await_migration("completed")
    source.end()
    there.goes_on()
    return there


@pytest.mark.parametrize("durable", [False, True], ids=["handed over", "durable"])
def test_a_guest_that_swaps_moves(disks: Path, pools: Path, durable: bool) -> None:
    with cluster_of(disks, pools, durable=durable) as cluster:
        here = cluster.host(waits=False)
        here.goes_on()
        aborted(cluster, here)
        destination_killed(cluster, here)
        for _ in range(MIGRATIONS):
            here = moved(cluster, here)
            now = counters(here.pools / "web.pool")
            assert now.pages_lost == 0 < now.prefetches
        here = source_killed(cluster, here)
        now = counters(here.pools / "web.pool")
        assert (now.pages_lost, now.bad_checksums, now.io_errors) == (0, 0, 0)
        names = cluster.backing.writers()
        assert len(names) == len(set(names)) == MIGRATIONS + 2, names  # never two at a time
