# SPDX-License-Identifier: BSD-3-Clause
"""What a disk of 5 ms costs requests for pages that are in RAM.

One client reads and writes pages that stay in RAM, one request at a time. Meanwhile, in turn: nothing else happens;
somebody who knows nothing of the device writes to the same disk, as many runs at once as a demotion does, which tells
what the emulated disk itself takes of the CPUs; other pages are demoted by as many threads as there may be; other
writes are refused and go to the disk. The disk is a block device: nbdkit's memory, behind its delay filter, through
nbdfuse and a loop device, for a file of nbdfuse itself takes one write at a time. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lz4.block

from benchmarks import peers
from tests.support import content, index, leftovers
from tests.support.harness import Control, counters, wait_until
from tmemd.store.requests import Choice, Request

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = content.PAGE
CORPUS_PAGES: Final = 4096
FIRST: Final = 2048  # pages before are written through, some of them
HOT: Final = range(FIRST, FIRST + 4096)
SPARE: Final = range(HOT.stop, HOT.stop + len(HOT) // 8)  # give up their slots to puts of hot pages
# In runs, each of which is one write; the page behind each was never written. Enough for the slices of one round.
RUN: Final = 32
RUNS: Final = 2048
COLD: Final = [SPARE.stop + run * (RUN + 1) + page for run in range(RUNS) for page in range(RUN)]
SPILLED: Final = range(COLD[-1] + 1, COLD[-1] + 1 + 16384)
SIZE: Final = (SPILLED.stop + 1024) * PAGE
FILL_DEPTH: Final = 16
SPILL_DEPTH: Final = 16
PERCENTILES: Final = ("50", "99", "99.9")
PHASES: Final = ("quiet", "disk", "demotion", "spills")
OPS: Final = {"get": "read", "put": "write"}
GOAL: Final = 2.0  # times the p99 beside the same writes by somebody else
WRITERS: Final = 8  # as many threads as demote


def run_command(*command: object) -> str:
    """Run a command that must succeed; returns what it printed."""
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def start(command: list[str], ready: Callable[[], bool], undo: contextlib.ExitStack) -> None:
    """Run a server, which *undo* kills, and wait until it is ready."""
    process = undo.enter_context(subprocess.Popen(leftovers.dying_with_us(command)))
    undo.callback(process.kill)
    wait_until(lambda: ready() or process.poll() is not None, command[0])
    if process.poll() is not None:
        raise RuntimeError(f"{command[0]} ended at its start")


@contextlib.contextmanager
def slow_disk(directory: Path, size: int, delay: float) -> Iterator[Path]:
    """A block device of *size* bytes whose every read and write takes *delay* seconds, eight or so at a time."""
    socket, mount = directory / "disk.sock", directory / "disk"
    mount.touch()
    delays = [f"{kind}delay={delay * 1000:.0f}ms" for kind in "rw"]
    server = ["nbdkit", "-f", "-U", str(socket), "--threads", "16", "--filter=delay", "memory", str(size), *delays]
    fuse = ["nbdfuse", "-C", "8", str(mount), f"nbd+unix:///?socket={socket}"]
    with contextlib.ExitStack() as undo:
        start(server, socket.exists, undo)
        start(fuse, lambda: mount.stat().st_size == size, undo)
        undo.callback(wait_until, lambda: subprocess.run(["umount", mount], check=False).returncode == 0, "umount")
        loop = Path(run_command("losetup", "--find", "--show", "--direct-io=on", mount))
        undo.callback(os.close, os.open(loop, os.O_RDONLY | os.O_CLOEXEC))
        run_command("losetup", "--detach", loop)  # once nobody has it open, however we end
        yield loop


def writes_per_second(disk: Path, depth: int) -> float:
    """Pages that the disk takes a second, so many at a time."""
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    each = 40

    def write(nth: int) -> None:
        with mmap.mmap(-1, PAGE) as zeros:
            for page in range(each):
                os.pwritev(fd, [zeros], (nth * each + page) * PAGE)

    start = time.monotonic()
    try:
        with ThreadPoolExecutor(depth) as together:
            list(together.map(write, range(depth)))
    finally:
        os.close(fd)
    return depth * each / (time.monotonic() - start)


@contextlib.contextmanager
def writing_elsewhere(disk: Path) -> Iterator[None]:
    """Runs of zeros are written behind the device's end, by as many threads as demote."""
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    stop = threading.Event()

    def write(nth: int) -> None:
        with mmap.mmap(-1, RUN * PAGE) as zeros:
            while not stop.is_set():
                os.pwritev(fd, [zeros], SIZE + nth * RUN * PAGE)

    with ThreadPoolExecutor(WRITERS) as together:
        writers = [together.submit(write, nth) for nth in range(WRITERS)]
        try:
            yield
        finally:
            stop.set()
    os.close(fd)
    for writer in writers:
        writer.result()


@dataclass
class Bench:
    """The device, its control page, and clients: of pages that stay in RAM, that are demoted, that are refused."""

    pool: Path
    disk_path: Path
    control: Control
    hot: peers.Loader
    cold: peers.Loader
    spilling: peers.Loader
    traces: Path
    slice_seconds: float
    slices: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    refused: int = 0  # of the pages that were to stay in RAM
    from_disk: int = 0  # of the gets that were to be from RAM
    spills_per_second: list[float] = field(default_factory=list)
    demotions_per_second: list[float] = field(default_factory=list)

    def use(self, phase: str) -> None:
        """One slice of each operation."""
        before = counters(self.pool)
        for op, command in OPS.items():
            self.slices.setdefault((phase, op), []).append(self.hot(command, 1, self.slice_seconds))
        self.from_disk += counters(self.pool).file_reads - before.file_reads

    def quiet(self) -> None:
        """Nothing else happens."""
        self.use("quiet")

    def disk(self) -> None:
        """The disk is as busy as a demotion makes it."""
        with writing_elsewhere(self.disk_path):
            self.use("disk")

    def demotion(self) -> None:
        """The cold pages, which cannot be compressed, are demoted, and written again afterwards."""
        before, start = counters(self.pool), time.monotonic()
        number = self.control.ask(Request.DEMOTE, SIZE, Choice(raw_only=True))
        wait_until(lambda: counters(self.pool).demotion_writes > before.demotion_writes, "a demotion")
        self.use("demotion")
        demoted, seconds = counters(self.pool).demotions - before.demotions, time.monotonic() - start
        if self.control.answered(number):
            raise RuntimeError("the demotion ended before its slices; the disk is faster than was thought")
        self.demotions_per_second.append(demoted / seconds)
        wait_until(lambda: self.control.answered(number), "the demotion to end")
        self.cold("replay", FILL_DEPTH, self.traces / "cold")

    def spills(self) -> None:
        """The pool is full: pages that cannot be compressed are refused, and go to the disk, several at a time."""
        self.hot("replay", FILL_DEPTH, self.traces / "hot")
        self.cold("replay", FILL_DEPTH, self.traces / "spare")  # their slots are free for puts of hot pages from now on
        before = counters(self.pool)
        self.control.target(before.used_bytes)
        wanted = []
        thread = threading.Thread(
            target=lambda: wanted.append(self.spilling("write", SPILL_DEPTH, len(OPS) * self.slice_seconds + 0.3))
        )
        thread.start()
        wait_until(lambda: counters(self.pool).spills > before.spills, "a spill")
        self.use("spills")
        thread.join()
        after = counters(self.pool)
        stored = index.kinds(self.pool)
        self.refused += sum(stored[page] is index.Kind.FILE for page in HOT)
        self.spills_per_second.append((after.spills - before.spills) / wanted[0]["seconds"])
        self.control.target(4 * SIZE)


def pages_of_one_size(n: int) -> list[bytes]:
    """Pages that are of the same size once compressed: a put over one finds a slot even where the pool may not grow."""
    text = content.compressible(0, 1)[8:]
    pages = [stamp.to_bytes(8, "little") + text for stamp in range(2 * n)]
    sizes = [len(lz4.block.compress(page, store_size=False)) for page in pages]
    usual = statistics.mode(sizes)
    return [page for page, size in zip(pages, sizes, strict=True) if size == usual][:n]


@contextlib.contextmanager
def new_bench(directory: Path, pools: Path, disk: Path, slice_seconds: float) -> Iterator[Bench]:
    """Serve a device on that disk and fill it."""
    easy, hard = directory / "easy", directory / "hard"
    easy.write_bytes(b"".join(pages_of_one_size(CORPUS_PAGES)))
    hard.write_bytes(b"".join(content.incompressible(page, 1) for page in range(CORPUS_PAGES)))
    keys = {"name": "slow", "size": SIZE, "backing": disk, "map": directory / "map", "limit": 4 * SIZE, "pools": pools}
    plugin = [
        str(peers.ROOT / "plugin" / "tmem.py"),
        *(f"{key}={value}" for key, value in keys.items()),
        "watermark=0",
        "clients=any",
    ]
    places = [peers.Place(directory / "loader", corpus, directory, pools) for corpus in (easy, hard, hard)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(peers.serving(peers.Peer("slow", ["python", *plugin]), places[0]))
        hot, cold, spilling = (stack.enter_context(peers.loading(server, place)) for place in places)
        control = stack.enter_context(Control(pools / "slow.pool"))
        bench = Bench(pools / "slow.pool", disk, control, hot, cold, spilling, directory, slice_seconds)
        bench.hot("within", len(HOT), HOT.start)
        bench.spilling("within", len(SPILLED), SPILLED.start)
        with_spares = [page for nth, spare in enumerate(SPARE) for page in (*HOT[nth * 8 : nth * 8 + 8], spare)]
        for name, pages in (("hot", with_spares), ("spare", SPARE), ("cold", COLD)):
            words = array("I", [word for page in pages for word in (page, page % CORPUS_PAGES)])
            (directory / name).write_bytes(words.tobytes())
        bench.hot("replay", FILL_DEPTH, directory / "hot")
        bench.cold("replay", FILL_DEPTH, directory / "cold")
        yield bench


def measure(rounds: int, slice_seconds: float, delay: float) -> dict[str, Any]:
    """All phases, in turn; times in microseconds."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(leftovers.directory("/var/tmp"))
        pools = stack.enter_context(leftovers.directory("/dev/shm"))
        run_command("make", "-s", "-C", HERE, f"BUILD={directory}")
        disk = stack.enter_context(slow_disk(directory, SIZE + WRITERS * RUN * PAGE, delay))
        rates = {depth: round(writes_per_second(disk, depth)) for depth in (1, 8)}
        bench = stack.enter_context(new_bench(directory, pools, disk, slice_seconds))
        phases: dict[str, Callable[[], None]] = {name: getattr(bench, name) for name in PHASES}
        for _ in range(rounds):
            for phase in phases.values():
                phase()
        stack.pop_all().close()
    return {
        "disk_writes_per_second": rates,
        "demotions_per_second": round(statistics.median(bench.demotions_per_second)),
        "spills_per_second": round(statistics.median(bench.spills_per_second)),
        "hot_pages_refused": bench.refused,
        "hot_gets_from_disk": bench.from_disk,
        "results": [summary(bench, phase, op) for op in OPS for phase in PHASES],
    }


def summary(bench: Bench, phase: str, op: str) -> dict[str, Any]:
    """Medians of one phase and operation over all rounds, and its p99 by those of the same round without demotion."""
    slices = bench.slices[phase, op]
    latencies = {
        key: statistics.median(each["latency_ns"][key] / 1000 for each in slices) for key in PERCENTILES
    }  # fmt: skip
    ratios = {
        base: [
            here["latency_ns"]["99"] / then["latency_ns"]["99"]
            for here, then in zip(slices, bench.slices[base, op], strict=True)
        ]
        for base in ("quiet", "disk")
    }
    rate = statistics.median(each["ops"] / each["seconds"] for each in slices)
    return {
        "op": op, "phase": phase, "latency_us": latencies, "per_second": round(rate),
        "p99_by": {
            base: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for base, found in ratios.items()
        },
    }  # fmt: skip


def render(found: dict[str, Any]) -> str:
    """A table for people."""
    rates = ", ".join(f"{rate} at depth {depth}" for depth, rate in found["disk_writes_per_second"].items())
    lines = [
        f"the disk: {rates} writes a second",
        f"demoted: {found['demotions_per_second']} pages a second; spilled: {found['spills_per_second']}; "
        f"not in RAM after all: {found['hot_pages_refused']} pages, {found['hot_gets_from_disk']} gets",
        "",
        "              a second   p50 us   p99 us  p99.9 us   p99 by quiet's     by disk's",
    ]
    for each in found["results"]:
        times = "".join(f"{each['latency_us'][key]:>9.0f}" for key in PERCENTILES)
        ratios = "   ".join("{median:.2f} ({least:.2f}-{most:.2f})".format(**by) for by in each["p99_by"].values())
        lines.append(f"{each['op']} {each['phase']:<9}{each['per_second']:>8}{times}   {ratios}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """The command line."""
    summary_line = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="benchmarks/slow_disk.py", description=summary_line)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--slice", type=float, default=0.5, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.005, help="of the disk, in seconds (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; exit status 1 when requests for pages in RAM waited for the disk."""
    args = parse_args()
    if os.geteuid():
        print("benchmarks/slow_disk.py: needs root, for a loop device", file=sys.stderr)
        return 2
    leftovers.own_mounts()
    leftovers.sweep()
    found = measure(args.rounds, args.slice, args.delay)
    print(json.dumps(found, indent=1) if args.json else render(found))
    return 1 if any(each["p99_by"]["disk"]["median"] > GOAL for each in found["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
