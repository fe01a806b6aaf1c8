# SPDX-License-Identifier: BSD-3-Clause
"""Compare the doors to a device, NBD and vhost-user-blk, ours and those of servers that do nothing.

One program puts the load on all of them, with the same clock, waiting and affinity (tests/support/frontend). At depth 1
a figure is where the scheduler put the two ends, so both placements are shown: server and load on one CPU, and on two.
The load sleeps until it is answered; on two CPUs it also stays awake, as KVM does for a guest that waits less than 200
us (halt_poll_ns). Rounds in turn, ratios within a round. Content is pages of live
processes. What others use of the machine meanwhile is told: a CPU that is busy with them is quicker to wake up, and
slower to answer, than an idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import pages, peers
from benchmarks.report import Goal, Spread
from tests.support import leftovers
from tests.support.harness import MIB, ROOT, Door, environment
from tests.support.load import Option, Report, build, load

PAGE: Final = 4096
IDLE_RATE: Final = 100  # requests a second of a device that is hardly used
UNTIL_IDLE: Final = 4.0  # seconds until a device has compacted and counted what a load left, and rests

NULL, NBD, VHOST, NULL_CO, LZ4 = "null, NBD", "tmem, NBD", "tmem, vhost", "null-co, vhost", "LZ4, vhost"
ONE, TWO, AWAKE = "one CPU", "two CPUs", "two CPUs, load awake"
READS, WRITES, FRESH = ("read 1", "read 32"), ("write 1", "write 32"), ("fresh 1", "fresh 32")
# Who is put under which load; 'fresh' are reads of pages that were never written: the door alone.
SERVERS_OF: Final = {
    **dict.fromkeys(READS, (NULL, NBD, VHOST)),
    "write 1": (NULL, NBD, VHOST),
    "write 32": (NULL, NBD, VHOST, LZ4),
    **dict.fromkeys(FRESH, (NULL_CO, VHOST)),
}

Figures: TypeAlias = dict[str, float]
"""What a server did under a load: requests a second, p50 and p99 and its CPU for each request in us."""


@dataclass(frozen=True)
class Round:
    """Everything measured once."""

    loads: dict[str, dict[str, dict[str, Figures]]]  # by placement, load and server
    idle: dict[str, float]  # percent of a CPU, by what little was asked of our device
    others: float  # percent of all CPUs that neither servers nor load used; it delays both


@dataclass(frozen=True)
class Server:
    """One server at one door."""

    door: Door
    socket: Path
    pid: int

    def run_on(self, cpu: int) -> None:
        """Keep all its threads, and those they will start, on one CPU."""
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {cpu})


@dataclass(frozen=True)
class Placement:
    """Who runs where."""

    load: int
    server: int  # both are CPUs
    awake: bool = False  # the load never sleeps

    def suits(self, name: str) -> bool:
        """Whether a load tells anything here: with many requests under way nobody sleeps for long."""
        return not self.awake or name.endswith(" 1")


@dataclass(frozen=True)
class Setting:
    """What is measured where: half of each device is written before, the other half never."""

    size: int  # bytes of each device
    corpus: Path
    seconds: float  # of one measurement
    idle_seconds: float
    placements: dict[str, Placement]

    def options(self, name: str) -> dict[str, Option]:
        """The options of a load by its name."""
        kind, depth = name.split()
        half = self.size // PAGE // 2
        return {
            "mix": "0:1" if kind == "write" else "1:0",
            "depth": int(depth),
            "first": half if kind == "fresh" else 0,
            "blocks": half,
            "corpus": self.corpus,
        }


@contextlib.contextmanager
def running(command: Sequence[str | Path], *sockets: Path) -> Iterator[int]:
    """Run a server until the context ends; yields its process id once it listens."""
    with subprocess.Popen(leftovers.dying_with_us(command), env=environment()) as process:
        try:
            for socket in sockets:
                peers.wait_for(socket, process)
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def null(directory: Path, size: int) -> Iterator[dict[str, Server]]:
    """Nbdkit with a plugin that does nothing."""
    socket = directory / "null.sock"
    with running(["nbdkit", "-f", "-U", socket, "null", str(size)], socket) as pid:
        yield {NULL: Server("nbd", socket, pid)}


@contextlib.contextmanager
def null_co(directory: Path, size: int) -> Iterator[dict[str, Server]]:
    """QEMU's vhost-user-blk back end in a thread of its own, over a driver that does nothing but fill in zeros."""
    socket = directory / "null-co.sock"
    export = f"vhost-user-blk,id=door,node-name=null,addr.type=unix,addr.path={socket},writable=on,iothread=thread"
    command = [
        "qemu-storage-daemon", "--object", "iothread,id=thread",
        "--blockdev", f"null-co,node-name=null,size={size},read-zeroes=on", "--export", export,
    ]  # fmt: skip
    with running(command, socket) as pid:
        yield {NULL_CO: Server("vhost", socket, pid)}


@contextlib.contextmanager
def lz4_alone(directory: Path, size: int) -> Iterator[dict[str, Server]]:
    """Our door with nothing behind it but LZ4 (lz4door.c)."""
    socket, program = directory / "lz4.sock", ROOT / "build" / "lz4door"
    with running([program, socket, str(size)], socket) as pid:
        yield {LZ4: Server("vhost", socket, pid)}


@contextlib.contextmanager
def tmem(directory: Path, pools: Path, setting: Setting) -> Iterator[dict[str, Server]]:
    """Our device with both its doors, half of it written."""
    nbd, vhost = directory / "tmem.sock", directory / "tmem-vhost.sock"
    place = peers.Place(Path(), setting.corpus, directory, pools)
    command = ["nbdkit", "-f", "-U", str(nbd), *peers.ours(place, setting.size).plugin, f"vhost={vhost}"]
    with running(command, nbd, vhost) as pid:
        half = setting.size // PAGE // 2
        load("nbd", nbd, mix="0:1", sequential=True, count=half, depth=32, corpus=setting.corpus)
        yield {NBD: Server("nbd", nbd, pid), VHOST: Server("vhost", vhost, pid)}


@contextlib.contextmanager
def all_servers(setting: Setting) -> Iterator[dict[str, Server]]:
    """Every server, by name."""
    with (
        leftovers.directory("/var/tmp") as directory,
        leftovers.directory("/dev/shm") as pools,
        null(directory, setting.size) as first,
        null_co(directory, setting.size) as second,
        lz4_alone(directory, setting.size) as third,
        tmem(directory, pools, setting) as ours,
    ):
        yield first | second | third | ours


def figures_of(report: Report) -> Figures:
    """What of a load's report is compared. Raises RuntimeError if a request failed."""
    if report.failed or not report.requests:
        raise RuntimeError(f"{report.failed} requests of {report.requests} failed")
    return {
        "per_second": report.per_second,
        "p50_us": report.p50_ns / 1e3,
        "p99_us": report.p99_ns / 1e3,
        "cpu_us": report.server_cpu_seconds / report.requests * 1e6,
    }


def measured(setting: Setting, server: Server, placement: str, name: str) -> Figures:
    """One server under one load."""
    where = setting.placements[placement]
    server.run_on(where.server)
    options = setting.options(name) | {"cpu": where.load, "pid": server.pid, "seconds": setting.seconds}
    if where.awake:
        options["spin"] = True
    return figures_of(load(server.door, server.socket, **options))


def idle(setting: Setting, server: Server) -> dict[str, float]:
    """What percentage of a CPU a server takes with a client that asks for nothing, and for next to nothing."""
    percent = {}
    for what, rate in (("idle", 0), (f"{IDLE_RATE}/s", IDLE_RATE)):
        time.sleep(UNTIL_IDLE)
        options = setting.options("read 1") | {"rate": rate, "seconds": setting.idle_seconds, "pid": server.pid}
        report = load(server.door, server.socket, **options)
        percent[what] = 100 * report.server_cpu_seconds / report.seconds
    return percent


def others_seconds(servers: Iterable[Server]) -> float:
    """What CPU time has gone to anything but these servers, us and the loads that have ended."""
    all_ = psutil.cpu_times()
    own = [psutil.Process(pid).cpu_times() for pid in {os.getpid(), *(server.pid for server in servers)}]
    ended = psutil.Process().cpu_times()
    busy = all_.user + all_.nice + all_.system + all_.irq + all_.softirq
    return float(busy - sum(each.user + each.system for each in own) - ended.children_user - ended.children_system)


def one_round(setting: Setting, servers: dict[str, Server]) -> Round:
    """Everything once; those that are compared with each other follow each other."""
    start, before = time.monotonic(), others_seconds(servers.values())
    loads = {
        placement: {
            name: {server: measured(setting, servers[server], placement, name) for server in names}
            for name, names in SERVERS_OF.items()
            if where.suits(name)
        }
        for placement, where in setting.placements.items()
    }
    little = idle(setting, servers[VHOST])
    others, seconds = others_seconds(servers.values()) - before, time.monotonic() - start
    return Round(loads, little, max(0.0, 100 * others / seconds / (os.cpu_count() or 1)))


def over(rounds: Sequence[Round], figure: Callable[[Round], float]) -> Spread:
    """One figure of each round."""
    return Spread.of([figure(round_) for round_ in rounds])


def ratio(where: str, name: str, peer: str, what: str = "per_second") -> Callable[[Round], float]:
    """What our vhost door shows under a load, as a multiple of what another server does."""

    def of(round_: Round) -> float:
        figures = round_.loads[where][name]
        return figures[VHOST][what] / figures[peer][what]

    return of


def goals(rounds: Sequence[Round]) -> list[Goal]:
    """What was promised, as far as it was measured."""
    rates = [
        (ONE, "read 1", NULL, 2.0), (ONE, "write 1", NBD, 1.4), (TWO, "read 1", NULL, 3.0), (TWO, "write 1", NULL, 3.0),
        (AWAKE, "read 1", NULL, 3.0), (AWAKE, "write 1", NULL, 3.0),
        (ONE, "read 32", NULL, 1.6), (TWO, "read 32", NULL, 1.6), (ONE, "write 32", LZ4, 0.85),
        (TWO, "write 32", LZ4, 0.85), (ONE, "fresh 1", NULL_CO, 0.9), (ONE, "fresh 32", NULL_CO, 0.9),
        (TWO, "fresh 32", NULL_CO, 0.9),
    ]  # fmt: skip
    found = [
        Goal(f"{where}, {name}: rate by {peer}'s", over(rounds, ratio(where, name, peer)), bound, True)
        for where, name, peer, bound in rates
        if where in rounds[0].loads
    ]
    for name in ("read 1", "write 1"):
        cpu = over(rounds, ratio(ONE, name, NBD, "cpu_us"))
        found.append(Goal(f"{ONE}, {name}: CPU by {NBD}'s", cpu, 0.5, False))
    for what, bound in (("idle", 0.1), (f"{IDLE_RATE}/s", 1.0)):
        percent = Spread.of([round_.idle[what] for round_ in rounds])
        found.append(Goal(f"{what}: percent of a CPU", percent, bound, False))
    return found


def load_table(rounds: Sequence[Round], placement: str) -> Table:
    """What every server did in one placement: medians, and of the rate the extremes."""
    table = Table(title=f"{placement}: 1000 requests/s; latencies and the server's CPU for a request in us")
    for column in ("load", "server", "rate", "p50", "p99", "CPU"):
        table.add_column(column, no_wrap=True)
    for name, servers in rounds[0].loads[placement].items():
        for server in servers:
            every = [round_.loads[placement][name][server] for round_ in rounds]
            rate = Spread.of([each["per_second"] / 1000 for each in every])
            others = (Spread.of([each[what] for each in every]).median for what in ("p50_us", "p99_us", "cpu_us"))
            shown = f"{rate.median:.1f} ({rate.low:.0f}-{rate.high:.0f})"
            table.add_row(name, server, shown, *(f"{figure:.2f}" for figure in others))
        table.add_section()
    return table


def goals_table(found: Sequence[Goal]) -> Table:
    """Promises and whether they were kept."""
    table = Table("our device by vhost", "measured", "promised", "met")
    for goal in found:
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
        table.add_row(goal.what, str(goal.measured), bound, "yes" if goal.met else "NO")
    return table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/doors.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--idle-seconds", type=float, default=4.0, help="the same of idle CPU (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=512, help="size of each device (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    return parser.parse_args()


def placements() -> dict[str, Placement]:
    """The CPUs of load and server; one CPU alone where there are no two."""
    first, *others = sorted(os.sched_getaffinity(0))
    two = {TWO: Placement(first, others[0]), AWAKE: Placement(first, others[0], awake=True)} if others else {}
    return {ONE: Placement(first, first), **two}


def main() -> int:
    """Measure and print; the exit status is 1 if a goal is missed."""
    args = parse_args()
    build("build/frontend", "build/lz4door")
    with leftovers.directory("/dev/shm") as memory:
        corpus = args.corpus or memory / "corpus"
        if not args.corpus:
            pages.capture(corpus, 16384)
        setting = Setting(args.mib * MIB, corpus, args.seconds, args.idle_seconds, placements())
        with all_servers(setting) as servers:
            rounds = [one_round(setting, servers) for _ in range(args.rounds)]
    found = goals(rounds)
    if args.json:
        report = {"rounds": [asdict(round_) for round_ in rounds], "goals": [asdict(goal) for goal in found]}
        print(json.dumps(report, indent=1))
    else:
        console = Console()
        for placement in setting.placements:
            console.print(load_table(rounds, placement))
        console.print(goals_table(found))
        console.print(f"Others used {Spread.of([round_.others for round_ in rounds])} % of all CPUs meanwhile.")
    return int(not all(goal.met for goal in found))


if __name__ == "__main__":
    sys.exit(main())
