# SPDX-License-Identifier: BSD-3-Clause
"""Measure our device against nbdkit's own plugins, and its memory against zram's, with real pages.

All servers run at once and are measured in turn within each round, in short slices, so that each ratio compares
neighbours in time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from benchmarks import density, pages, peers, report

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = 4096
FIO_ROUNDS: Final = 5
FIO_SECONDS: Final = 1  # it takes whole ones
WARM_UP: Final = 5.0  # seconds of writes before anything counts
OVERWRITES: Final = 10
QUICK_OVERWRITES: Final = 2
TMPFS: Final = "/dev/shm"

Running = dict[str, tuple[peers.Peer, peers.Server, peers.Loader]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one short round on fewer pages: is everything in order?")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all peers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of each device (default: 1 GiB)")
    parser.add_argument("--pages", type=int, default=65536, help="real pages to capture (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    parser.add_argument("--only", choices=("speed", "density"), help="measure only this")
    parser.add_argument("--against", type=Path, metavar="TREE", help="measure another, built checkout, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as tables")
    parser.add_argument("--output", type=Path, help="where to keep the JSON (default: benchmarks/results/DATE.json)")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.size, args.pages = 2, 0.5, 64 << 20, 16384
    return args


def say(what: str) -> None:
    """Show progress."""
    print(f"  {what}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Where and when this was measured."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": cpu.split(":", 1)[1].strip(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def measure(server: peers.Server, load: peers.Loader, op: str, depth: int, seconds: float) -> dict[str, float]:
    """One phase on one server: requests a second, server CPU for each, latency."""
    before = server.cpu_seconds()
    result = load(op, depth, seconds)
    cpu = server.cpu_seconds() - before
    latency = {f"p{percent}_us": ns / 1000 for percent, ns in result["latency_ns"].items()}
    return {"iops": result["ops"] / result["seconds"], "cpu_us": cpu / result["ops"] * 1e6, **latency}


def bare_lz4(load: peers.Loader, seconds: float) -> dict[str, float]:
    """LZ4 alone on the same pages, on one thread."""
    result = load("lz4", 1, seconds)
    return {"ns": result["seconds"] / result["ops"] * 1e9, "bytes_per_page": result["bytes_per_page"]}


def one_round(running: Running, number: int, args: argparse.Namespace) -> report.Round:
    """Each phase on each peer; who comes first changes from round to round."""
    names = list(running)
    names = names[number % len(names) :] + names[: number % len(names)]
    figures: report.Round = {"lz4": {"": bare_lz4(running[peers.BASE][2], args.seconds)}}
    for phase in report.PHASES:
        op, depth = phase.split()
        say(f"round {number + 1}/{args.rounds}: {phase}")
        for name in names:
            _, server, load = running[name]
            figures.setdefault(phase, {})[name] = measure(server, load, op, int(depth), args.seconds)
        figures[phase] = {name: figures[phase][name] for name in running}
    return figures


def fio_round(running: Running, phases: Sequence[str]) -> report.Round:
    """Some of the same phases by fio."""
    figures: report.Round = {}
    for phase in phases:
        op, depth = phase.split()
        say(f"fio: {phase}")
        figures[phase] = {
            name: peers.fio(server, op, int(depth), FIO_SECONDS) for name, (_, server, _) in running.items()
        }
    return figures


def fio_rounds(running: Running, n: int) -> list[report.Round]:
    """All reads come first: what fio writes is synthetic, and reads are to be of real pages."""
    reads = [fio_round(running, report.READS) for _ in range(n)]
    writes = [fio_round(running, report.WRITES) for _ in range(n)]
    return [read | write for read, write in zip(reads, writes, strict=True)]


def warm_up(running: Running) -> None:
    """Fill every device with real pages, then write until memory is recycled rather than taken."""
    for name, (_, _, load) in running.items():
        say(f"fill: {name}")
        load("fill", 32)
        load("write", 32, WARM_UP)


def verify(running: Running) -> None:
    """Every page of every peer that keeps them must be what was written last."""
    for name, (peer, _, load) in running.items():
        if peer.keeps:
            say(f"verify: {name}")
            load("verify", 32)


def measure_speed(args: argparse.Namespace, place: peers.Place) -> dict[str, Any]:
    """All rounds on all peers."""
    with contextlib.ExitStack() as stack:
        running: Running = {}
        for peer in peers.all_peers(place, args.size, args.against):
            server = stack.enter_context(peers.serving(peer, place))
            running[peer.name] = peer, server, stack.enter_context(peers.loading(server, place))
        warm_up(running)
        rounds = [one_round(running, number, args) for number in range(args.rounds)]
        verify(running)
        return {"rounds": rounds, "fio": fio_rounds(running, min(args.rounds, FIO_ROUNDS))}


@contextlib.contextmanager
def new_place(loader: Path, corpus: Path) -> Iterator[peers.Place]:
    """Fresh directories for one measurement."""
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=TMPFS) as pools:
        yield peers.Place(loader, corpus, Path(disk), Path(pools))


def get_corpus(args: argparse.Namespace, directory: Path) -> Path:
    """The pages named on the command line, or new ones."""
    if args.corpus:
        return args.corpus.absolute()  # type: ignore[no-any-return]
    say(f"capture {args.pages} pages of live programs")
    pages.capture(directory / "pages", args.pages)
    return directory / "pages"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run."""
    results: dict[str, Any] = {"machine": machine(), "rounds": [], "fio": [], "density": {}}
    with tempfile.TemporaryDirectory() as build, tempfile.TemporaryDirectory(dir=TMPFS) as memory:
        subprocess.run(["make", "-s", "-C", str(HERE), f"BUILD={build}"], check=True)
        loader, corpus = Path(build) / "loader", get_corpus(args, Path(memory))
        results["machine"]["pages"] = corpus.stat().st_size // PAGE
        if args.only != "density":
            with new_place(loader, corpus) as place:
                results |= measure_speed(args, place)
        if args.only != "speed":
            with new_place(loader, corpus) as place:
                results["density"] = density.measure(place, QUICK_OVERWRITES if args.quick else OVERWRITES, say)
    return results


def keep(results: dict[str, Any], output: Path | None) -> Path:
    """Store the results as JSON."""
    date = results["machine"]["date"].replace(":", "").replace("+0000", "Z")
    path = output or HERE / "results" / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def interrupted(*_: object) -> NoReturn:
    """A signal ends us the way Ctrl-C does, so that every clean-up runs."""
    raise KeyboardInterrupt


def main() -> int:
    """Measure, print, keep."""
    args = parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    try:
        results = run(args)
    except KeyboardInterrupt:
        say("interrupted; everything it started is stopped and removed")
        return 130
    path = keep(results, args.output)
    print(json.dumps(results, indent=1) if args.json else report.render(results))
    say(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
