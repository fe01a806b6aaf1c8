# SPDX-License-Identifier: BSD-3-Clause
"""What fetching ahead gains where the file is far away, and what it costs where it cannot gain.

A client reads pages that are in the backing file alone, one request at a time: in order, every seventh, backwards, two
streams in turn, at random. Then it reads pages in order while another reads pages that are in RAM, of which none may be
lost. Two devices take turns, with prefetch=no and prefetch=auto. Their files are as far away as the delay says, exports
of nbdkit's memory behind its delay filter; without a delay they are files of this machine's disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import peers
from benchmarks.slow_disk import HERE, run_command, start
from tests.support import content, leftovers
from tests.support.harness import Control, counters
from tests.support.index import Kind, kinds
from tmemd.store.requests import Request

PAGE: Final = content.PAGE
CORPUS_PAGES: Final = 4096
READ_BACK: Final = (1 << 32) - 1
FILL_DEPTH: Final = 16
COLD: Final = range(2048, 2048 + 16384)
HOT: Final = range(COLD.stop + 1024, COLD.stop + 1024 + 4096)
SIZE: Final = (HOT.stop + 1024) * PAGE
STRIDE: Final = 7
BASE: Final = "no"
GOAL: Final = 3.0  # times as fast, but at random
RANDOM_GOAL: Final = 0.97


def patterns(n: int) -> dict[str, list[int]]:
    """So many pages each, in the order in which they are read."""
    half = COLD.start + len(COLD) // 2
    return {
        "in order": list(COLD[:n]),
        "every seventh": list(COLD[: n * STRIDE : STRIDE]),
        "backwards": list(COLD[n - 1 :: -1]),
        "two streams": [page for pair in zip(COLD, range(half, COLD.stop), strict=False) for page in pair][:n],
        "at random": random.Random(1).sample(COLD, n),
    }


def save(pages: list[int], path: Path, *, write: bool = False) -> Path:
    """A trace for the loader: read these pages and compare them, or write them."""
    words = [word for page in pages for word in (page, page % CORPUS_PAGES if write else READ_BACK)]
    path.write_bytes(array("I", words).tobytes())
    return path


@dataclass
class Device:
    """One of the two, with a client for pages that are in the file, and one for pages in RAM."""

    mode: str
    pool: Path
    control: Control
    cold: peers.Loader
    hot: peers.Loader
    traces: dict[str, Path]
    filling: Path
    slices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lost: int = 0  # pages that were in RAM
    hot_per_second: float = 0.0
    cold_per_second: float = 0.0  # beside them

    def fill(self) -> None:
        """Write what will be cold; it is in the file alone from then on."""
        self.cold("replay", FILL_DEPTH, self.filling)
        self.demote()

    def demote(self) -> None:
        """Move everything to the file; what is there already is not written."""
        if self.control.request(Request.DEMOTE, 4 * SIZE):
            raise RuntimeError("the demotion failed")

    def read(self, name: str) -> None:
        """One slice."""
        self.demote()
        before = counters(self.pool)
        found = self.cold("replay", 1, self.traces[name])
        after = counters(self.pool)
        found["fetched"] = after.prefetches - before.prefetches
        found["used"] = after.prefetch_hits - before.prefetch_hits
        self.slices.setdefault(name, []).append(found)

    def read_beside_hot(self, seconds: float) -> None:
        """Read in order again and again, in little room beside a working set that was put and is being read."""
        self.demote()
        self.hot("replay", FILL_DEPTH, self.filling.with_name("hot"))
        self.control.target(counters(self.pool).used_bytes * 9 // 8)
        stop, cold = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                cold.append(self.cold("replay", 1, self.traces["in order"]))

        thread = threading.Thread(target=read)
        thread.start()
        found = self.hot("read", 1, seconds)
        stop.set()
        thread.join()
        self.hot_per_second = found["ops"] / found["seconds"]
        self.cold_per_second = sum(each["ops"] for each in cold) / sum(each["seconds"] for each in cold)
        stored = kinds(self.pool)
        self.lost += sum(stored[page] is Kind.FILE for page in HOT)
        self.control.target(4 * SIZE)


@contextlib.contextmanager
def new_device(mode: str, place: peers.Place, disk: object, n: int) -> Iterator[Device]:
    """Serve a device on that disk."""
    keys = {
        "name": mode, "size": SIZE, "backing": disk, "bitmap": place.disk / "map", "limit": 4 * SIZE,
        "pools": place.pools, "prefetch": mode, "clients": "any",
    }  # fmt: skip
    plugin = [str(peers.ROOT / "plugin" / "tmem.py"), *(f"{key}={value}" for key, value in keys.items())]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(peers.serving(peers.Peer(mode, ["python", *plugin]), place))
        cold, hot = (stack.enter_context(peers.loading(server, place)) for _ in range(2))
        control = stack.enter_context(Control(place.pools / f"{mode}.pool"))
        traces = {name: save(pages, place.disk / name.replace(" ", "-")) for name, pages in patterns(n).items()}
        filling = save(list(COLD), place.disk / "cold", write=True)
        save(list(HOT), place.disk / "hot", write=True)
        hot("within", len(HOT), HOT.start)
        device = Device(mode, place.pools / f"{mode}.pool", control, cold, hot, traces, filling)
        device.fill()
        yield device


@contextlib.contextmanager
def far_disk(directory: Path, delay: float, size: int = 2 * SIZE) -> Iterator[object]:
    """What backing= is told: an export as far away as that, or a file."""
    if not delay:
        yield directory / "disk"
        return
    socket, delays = directory / "far.sock", [f"{op}delay={delay * 1000:.0f}ms" for op in ("r", "w")]
    server = ["nbdkit", "-f", "-U", str(socket), "--threads", "16", "--filter=delay", "memory", str(size), *delays]
    with contextlib.ExitStack() as undo:
        start(server, socket.exists, undo)
        yield f"nbd+unix:///?socket={socket}"


def measure(modes: list[str], n: int, rounds: int, delay: float) -> list[dict[str, Any]]:
    """All patterns on all devices, in turn."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(leftovers.directory("/var/tmp"))
        pools = stack.enter_context(leftovers.directory("/dev/shm"))
        run_command("make", "-s", "-C", HERE, f"BUILD={directory}")
        corpus = directory / "corpus"
        corpus.write_bytes(b"".join(content.compressible(page, 1) for page in range(CORPUS_PAGES)))
        devices = []
        for mode in modes:
            here = directory / mode
            here.mkdir()
            place = peers.Place(directory / "loader", corpus, here, pools)
            disk = stack.enter_context(far_disk(here, delay))
            devices.append(stack.enter_context(new_device(mode, place, disk, n)))
        for _ in range(rounds):
            for name in patterns(n):
                for device in devices:
                    device.read(name)
        for device in devices:
            device.read_beside_hot(5.0)
        return [summary(device, devices[0], name) for name in patterns(n) for device in devices] + [
            {
                "pattern": "hot",
                "mode": device.mode,
                "per_second": device.hot_per_second,
                "lost": device.lost,
                "cold_per_second": device.cold_per_second,
            }
            for device in devices
        ]


def summary(device: Device, base: Device, name: str) -> dict[str, Any]:
    """One pattern on one device."""
    slices = device.slices[name]
    times = [
        then["seconds"] / here["seconds"] for here, then in zip(slices, base.slices[name], strict=True)
    ]  # fmt: skip
    return {
        "pattern": name, "mode": device.mode,
        "per_second": statistics.median(each["ops"] / each["seconds"] for each in slices),
        "p50_us": statistics.median(each["latency_ns"]["50"] / 1000 for each in slices),
        "p99_us": statistics.median(each["latency_ns"]["99"] / 1000 for each in slices),
        "times": statistics.median(times), "least": min(times), "most": max(times),
        "fetched": sum(each["fetched"] for each in slices), "used": sum(each["used"] for each in slices),
    }  # fmt: skip


def render(found: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = ["pattern        prefetch  a second   p50 us   p99 us   times as fast     fetched    used"]
    for each in found:
        if each["pattern"] == "hot":
            lines.append(
                f"RAM beside it  {each['mode']:<8}{each['per_second']:>10.0f}   lost: {each['lost']} pages;"
                f" in order, in little room: {each['cold_per_second']:.0f} a second"
            )
            continue
        lines.append(
            f"{each['pattern']:<14} {each['mode']:<8}{each['per_second']:>10.0f}{each['p50_us']:>9.0f}"
            f"{each['p99_us']:>9.0f}   {each['times']:.2f} ({each['least']:.2f}-{each['most']:.2f}) "
            f" {each['fetched']:>9} {each['used']:>7}"
        )
    return "\n".join(lines)


def is_good(found: list[dict[str, Any]]) -> bool:
    """Whether it is as fast as it should be."""
    ours = [each for each in found if each["mode"] != BASE]
    return all(
        each["lost"] == 0 if each["pattern"] == "hot"
        else each["times"] >= (RANDOM_GOAL if each["pattern"] == "at random" else GOAL)
        for each in ours
    )  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/prefetch.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--pages", type=int, default=2000, help="that are read each time (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.001, help="of the file, in seconds (default: %(default)s)")
    parser.add_argument("--mode", default="auto", help="of prefetch= that is compared with no (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; exit status 1 where it gains too little, or costs something."""
    args = parse_args()
    leftovers.sweep()
    found = measure([BASE, args.mode], args.pages, args.rounds, args.delay)
    print(json.dumps(found, indent=1) if args.json else render(found))
    return 0 if not args.delay or is_good(found) else 1


if __name__ == "__main__":
    sys.exit(main())
