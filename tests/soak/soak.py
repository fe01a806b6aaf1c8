# SPDX-License-Identifier: BSD-3-Clause
"""Devices of every kind under one tmemd, whose processes are killed again and again while writers use them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from tests.soak.ledger import RUN, Ledger, WrongError, read_runs
from tests.soak.writers import Writers
from tests.support import fakes, index, leftovers
from tests.support.content import PAGE
from tests.support.harness import MIB, Control, Server, counters, device, environment, nbdkit_command, taken
from tmemd.store.poolfile import Counters, PoolError
from tmemd.store.requests import Request

REGION: Final = 8192  # pages for which one bit of the bitmap speaks
REGIONS: Final = 3
PAGES: Final = REGIONS * REGION
# As many pages at the start of each region, and the device's last, so that each kill can be followed by a look at all.
RUNS: Final = [*(region * REGION + at for region in range(REGIONS) for at in range(0, 640, RUN)), PAGES - RUN]
LIMIT: Final = 8 * MIB  # of those that have a file: they have 4.5 MiB of pages once compressed, and an index
BUDGET: Final = 20 * MIB
CONFIG: Final = f'[budget]\nminimum = {BUDGET}\nmaximum = {BUDGET}\nreserve = "0%"\n'
KINDS: Final[dict[str, dict[str, str]]] = {
    "swap": {},
    "refusing": {"watermark": "0"},  # puts are refused when it is full
    "durable": {"flush": "durable"},
    "ram": {"backing": "none", "limit": str(4 * LIMIT)},
}
LOG: Final = 600  # characters of each server's log that are shown when something is wrong
DISTURB_EVERY: Final = 0.02  # seconds
HOST_DIES_EVERY: Final = 10  # kills
DESCRIPTORS: Final = 16  # how many more a process may have than at first: clients come and go
SLACK: Final = 1.10  # memory of a pool, and of a fresh one with the same pages


class SoakError(Exception):
    """Something was lost, stale, leaked or failed; the message says what, and after which kill."""


@dataclass
class Findings:
    """What was done and seen so far."""

    kills: int = 0
    kills_of_plugins: int = 0
    kills_of_tmemd: int = 0
    kills_while_attaching: int = 0
    host_deaths: int = 0
    pages_verified: int = 0
    pages_lost_with_the_host: int = 0  # of write-back devices: newest or an error
    pages_older_after_host_death: int = 0  # of durable devices: no older than the last FLUSH
    requests: int = 0
    seconds: float = 0.0
    memory_of_fresh: dict[str, float] = field(default_factory=dict)  # by device, 1: as a fresh pool with the same pages


class Device:
    """One device: its server, and who writes to it."""

    def __init__(self, kind: str, run: Path, tmemd: fakes.Tmemd) -> None:
        """A device of one of the KINDS; *run* is made for its backing file and its server's socket and log."""
        run.mkdir()
        self.name = kind
        self.pool = tmemd.directory / f"{kind}.pool"
        keys = {"backing": str(run / "backing"), "limit": str(LIMIT)} | KINDS[kind]
        self.has_file, self.durable = keys["backing"] != "none", "flush" in keys
        self.ledger = Ledger(RUNS, file=self.has_file, durable=self.durable)
        self.server = Server(run, device(kind, tmemd.directory, PAGES * PAGE, **keys, tmemd=tmemd.socket))
        self.writers: Writers | None = None
        self.descriptors: int | None = None  # of its first server, with writers

    def start(self) -> None:
        """Serve."""
        self.server.start()

    def write(self, rng: random.Random) -> None:
        """Let writers go on until it is killed."""
        self.writers = Writers(self.server.socket, self.ledger, rng, may_refuse=not self.has_file)

    def kill(self) -> None:
        """SIGKILL under the writers. Raises what went wrong with one of them before."""
        if self.writers:
            self.writers.expect_death()
        self.server.kill()
        if self.writers:
            self.writers.join()
        self.writers = None

    def rest(self) -> None:
        """End the writers; the server lives."""
        if self.writers:
            self.writers.join()
        self.writers = None

    def verify(self, runs: Sequence[int], *, host_died: bool = False) -> int:
        """Look at these runs; returns how many pages. WrongError if one is wrong."""
        try:
            with self.server.client() as client:
                return self.ledger.verify(client, runs, host_died=host_died)
        except WrongError as error:
            raise WrongError(f"{self.name}: {error}") from None

    def check_counters(self) -> Counters:
        """Nothing in it is damaged. Raises SoakError."""
        now = counters(self.pool)
        if now.bad_checksums or (now.io_errors and self.has_file):
            raise SoakError(f"{self.name}: {now.bad_checksums} bad checksums, {now.io_errors} I/O errors")
        return now


class Soak:
    """The devices and their tmemd, below two directories that are removed at the end."""

    def __init__(self, base: Path, disk: Path, kinds: Sequence[str], seed: int) -> None:
        self.findings = Findings()
        self._base, self._disk = base, disk
        self._rng = random.Random(seed)
        self._tmemd = fakes.start_tmemd(base, config=CONFIG)
        self._tmemd_descriptors: int | None = None
        self._stop = threading.Event()
        self._disturber: threading.Thread | None = None
        self.devices = [Device(kind, disk / kind, self._tmemd) for kind in kinds]

    def start(self) -> None:
        """Serve all devices, write to them, and disturb them."""
        for each in self.devices:
            each.start()
            each.write(self._rng)
            self._tmemd.client.set(each.name, weight=200)  # so that its file of settings is there
        self._files = self._all_files()
        self._disturb()

    def close(self) -> None:
        """End all processes and threads, whatever happened."""
        self._stop.set()
        for each in self.devices:
            with contextlib.suppress(Exception):
                each.kill()
        self._tmemd.process.kill()
        self._tmemd.process.wait()
        if self._disturber:
            self._disturber.join()

    def copy_to(self, place: Path) -> None:
        """Copy all files, as they are, into a new directory."""
        place.mkdir()
        subprocess.run(["cp", "-a", "--sparse=always", self._base, self._disk, place], check=True)

    # What is done to them.

    def _disturb(self) -> None:
        self._disturber = threading.Thread(target=self._keep_disturbing, args=(random.Random(self._rng.random()),))
        self._disturber.start()

    def _keep_disturbing(self, rng: random.Random) -> None:
        while not self._stop.wait(DISTURB_EVERY * rng.random()):
            with contextlib.suppress(PoolError):  # tmemd or the plugin is away
                self._disturb_once(rng)

    def _disturb_once(self, rng: random.Random) -> None:
        client, name = self._tmemd.client, rng.choice(self.devices).name
        match rng.randrange(6):
            case 0:
                client.set_target(name, rng.randint(3 * MIB, LIMIT))
            case 1:
                client.set(name, target=None, weight=rng.randint(1, 1000))
            case 2:
                client.set_frozen(name, rng.random() < 0.2)
            case 3:
                client.ask(name, "drain")
            case 4:
                client.ask(name, "compact")
            case _:
                client.ask(name, "demote", rng.randrange(MIB))

    def kill_once(self) -> None:
        """One kill at a moment nobody chose, and a look at what it left. Raises SoakError, WrongError or nbd.Error."""
        rng, findings = self._rng, self.findings
        findings.kills += 1
        victim = rng.choice(self.devices)
        assert victim.writers
        victim.ledger.wait_for(rng.randrange(1, 30), victim.writers.ended)
        time.sleep(rng.random() * 0.002)  # acknowledgements must not be the only moments to die at
        kind = rng.random()
        if findings.kills % HOST_DIES_EVERY == 0:
            self._host_dies()
        elif kind < 0.15:
            self._kill_tmemd()
            self._start_tmemd()
        elif kind < 0.3:
            self._kill_both(victim)
        else:
            self._kill_plugin(victim)
            self._come_back(victim)

    def _kill_plugin(self, victim: Device) -> None:
        self.findings.kills_of_plugins += 1
        self._check_descriptors(victim)
        victim.kill()
        if self._rng.random() < 0.15:
            self._kill_while_attaching(victim)

    def _kill_while_attaching(self, victim: Device) -> None:
        self.findings.kills_while_attaching += 1
        socket = self._disk / "unused.sock"
        command = leftovers.dying_with_us(nbdkit_command(socket, victim.server.parameters))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment()) as process:
            time.sleep(self._rng.random() * 0.4)  # anywhere between exec and the first connection
            process.kill()
        socket.unlink(missing_ok=True)

    def _kill_tmemd(self) -> None:
        self.findings.kills_of_tmemd += 1
        self._check_tmemd_descriptors()
        self._tmemd.stop(signal.SIGKILL)
        assert self._tmemd.process.stderr
        self._tmemd.process.stderr.close()

    def _start_tmemd(self) -> None:
        self._tmemd = fakes.start_tmemd(self._base, config=CONFIG)

    def _kill_both(self, victim: Device) -> None:
        """The plugin comes back before tmemd, which it does not need, or after it."""
        self._kill_tmemd()
        self._kill_plugin(victim)
        if self._rng.random() < 0.5:
            self._come_back(victim)
            self._start_tmemd()
        else:
            self._start_tmemd()
            self._come_back(victim)

    def _come_back(self, victim: Device) -> None:
        victim.start()
        part = 1.0 if self._rng.random() < 0.1 else 0.25
        self._verify(victim, part=part)
        victim.check_counters()
        victim.write(self._rng)

    def _verify(self, victim: Device, *, part: float = 1.0, host_died: bool = False) -> None:
        """A part of its pages, and all that were being changed."""
        runs = [run for run in RUNS if self._rng.random() < part or not victim.ledger.is_settled(run)]
        self.findings.pages_verified += victim.verify(runs, host_died=host_died)

    def _host_dies(self) -> None:
        """All processes die and the pools are gone; what was written to files is there, synced or not."""
        self.findings.host_deaths += 1
        self._kill_tmemd()
        for each in self.devices:
            each.kill()
        for path in self._tmemd.directory.iterdir():
            path.unlink()
        self._start_tmemd()
        for each in self.devices:
            if not each.has_file:
                each.ledger.forget_all()
            each.start()
            self._verify(each, host_died=True)
            if not each.durable and self._rng.random() < 0.5:
                self._make_new(each)
            each.write(self._rng)

    def _make_new(self, each: Device) -> None:
        """As a guest does that boots anew: swapon --discard."""
        with each.server.client() as client:
            for offset in range(0, PAGES * PAGE, 32 * MIB):
                client.trim(min(32 * MIB, PAGES * PAGE - offset), offset)
        each.ledger.forget_all()

    # What may be left behind.

    def _check_descriptors(self, victim: Device) -> None:
        now = psutil.Process(victim.server.pid).num_fds()
        victim.descriptors = victim.descriptors or now
        if now > victim.descriptors + DESCRIPTORS:
            raise SoakError(f"{victim.name}: its server has {now} open files, at first {victim.descriptors}")

    def _check_tmemd_descriptors(self) -> None:
        now = psutil.Process(self._tmemd.process.pid).num_fds()
        self._tmemd_descriptors = self._tmemd_descriptors or now
        if now > self._tmemd_descriptors + DESCRIPTORS:
            raise SoakError(f"tmemd has {now} open files, at first {self._tmemd_descriptors}")

    def _all_files(self) -> set[str]:
        return {str(path) for path in (*self._base.rglob("*"), *self._disk.rglob("*"))}

    def _our_processes(self) -> list[str]:
        """All that run with one of our directories on their command line, this process aside."""
        marks = str(self._base), str(self._disk)
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            if process.pid != os.getpid() and any(mark in word for mark in marks for word in words):
                found.append(f"{process.pid}: {' '.join(words)}")
        return found

    def finish(self) -> None:
        """All pages and all memory, at the end. Raises SoakError or WrongError."""
        self._stop.set()
        if self._disturber:
            self._disturber.join()
        for each in self.devices:
            each.rest()
            self._verify(each)
        files = self._all_files()
        if files != self._files:
            raise SoakError(f"files appeared or are gone: {', '.join(sorted(files ^ self._files))}")
        self._kill_tmemd()
        for each in self.devices:
            self._check_memory(each)
            each.kill()
        if left := self._our_processes():
            raise SoakError(f"processes are left: {'; '.join(left)}")

    def _check_memory(self, each: Device) -> None:
        """What tmpfs gave is what the counters say, and what a fresh pool takes for the same pages."""
        with Control(each.pool) as control:
            control.frozen(False)
            control.target(4 * LIMIT)
            if control.request(Request.COMPACT):
                raise SoakError(f"{each.name}: settling failed")
        now = each.check_counters()
        if now.used_bytes != taken(each.pool):
            raise SoakError(f"{each.name}: {now.used_bytes} bytes are counted, tmpfs gave {taken(each.pool)}")
        fresh = self._fresh(each)
        share = (now.used_bytes - now.index_bytes) / (fresh.used_bytes - fresh.index_bytes)
        self.findings.memory_of_fresh[each.name] = round(share, 3)
        if (now.pages_in_tmem, now.payload_bytes) != (fresh.pages_in_tmem, fresh.payload_bytes):
            raise SoakError(f"{each.name}: {now.pages_in_tmem} pages are counted, {fresh.pages_in_tmem} are there")
        if share > SLACK:
            raise SoakError(f"{each.name}: takes {share:.2f} times the memory of a fresh pool with the same pages")

    def _fresh(self, each: Device) -> Counters:
        """The counters of a new pool with the pages that are in *each* one's."""
        stored = index.kinds(each.pool)
        with leftovers.directory("/dev/shm") as pools, leftovers.directory("/var/tmp") as run:
            new = Server(run, device("fresh", pools, PAGES * PAGE, run / "backing", 4 * LIMIT, reserve="no"))
            try:
                with new.start().client() as to, each.server.client() as of:
                    for page, data in read_runs(of, RUNS):
                        if data and stored[page] is index.Kind.TMEM:
                            to.pwrite(data, page * PAGE)
                with Control(pools / "fresh.pool") as control:
                    control.request(Request.COMPACT)
                return counters(pools / "fresh.pool")
            finally:
                new.kill()


@contextlib.contextmanager
def soaking(kinds: Sequence[str], seed: int) -> Iterator[Soak]:
    """Devices that are served and written to; whatever happens, nothing of them is left."""
    with leftovers.directory("/dev/shm") as base, leftovers.directory("/var/tmp") as disk:
        soak = Soak(base, disk, kinds, seed)
        try:
            soak.start()
            yield soak
        finally:
            soak.close()


def run(
    kinds: Sequence[str],
    *,
    kills: int,
    seconds: float,
    seed: int,
    progress: Callable[[Findings], None],
    keep: Path | None = None,
) -> Findings:
    """Kill until there were so many kills, or so many seconds have passed; then look at everything.

    Raises SoakError, naming seed and kill; then *keep*, which must not be there yet, gets a copy of pools and files.
    """
    start = time.monotonic()
    with soaking(kinds, seed) as soak:
        findings = soak.findings
        try:
            while findings.kills < kills and time.monotonic() - start < seconds:
                soak.kill_once()
                findings.seconds = time.monotonic() - start
                progress(findings)
            soak.finish()
        except Exception as error:
            if keep:
                soak.copy_to(keep)
            logs = "\n".join(f"{each.name}: {each.server.log()[-LOG:]}" for each in soak.devices)
            raise SoakError(f"seed {seed}, kill {findings.kills}: {error!r}\n{logs}") from error
        finally:
            for each in soak.devices:
                findings.pages_lost_with_the_host += each.ledger.pages_lost
                findings.pages_older_after_host_death += each.ledger.pages_older
                findings.requests += each.ledger.requests
            findings.seconds = time.monotonic() - start
    return findings
