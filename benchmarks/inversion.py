# SPDX-License-Identifier: BSD-3-Clause
"""Does the hot working set get the RAM, or do the cold pages that came first keep it?

Each pattern runs on two devices side by side: one demotes cold pages ahead of need, one refuses when full. Their pools
are filled with cold pages until many are refused; those age; then comes a hot set that would fit. Every page that is
read is compared with what was written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

from benchmarks import pages, peers
from tmemd.store import poolfile
from tmemd.store.poolfile import Counters

HERE: Final = Path(__file__).resolve().parent
TMPFS: Final = "/dev/shm"
CORPUS_PAGES: Final = 16384
LIMIT: Final = 48 << 20  # of each pool: about 30000 real pages
FIRST: Final = 2048  # pages before are written through, some of them
COLD: Final = 40_000
HOT: Final = 14_000  # about half of the pool
DEVICE_PAGES: Final = FIRST + COLD + HOT + 1024
DEPTH: Final = 8
GROWN_COLD: Final = 12.0  # seconds that the cold pages are left alone: two generations
READ_BACK: Final = 0xFFFFFFFF
GOAL: Final = 0.95
MODES: Final = {"refuse when full": 0, "demote ahead": None}  # free watermark in percent; None: the default

COLD_PAGES: Final = range(FIRST, FIRST + COLD)
HOT_PAGES: Final = range(FIRST + COLD, FIRST + COLD + HOT)
ALL_PAGES: Final = range(FIRST, FIRST + COLD + HOT)


class Trace:
    """Requests in order, as the loader takes them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.words = array("I")

    def write(self, chosen: Sequence[int]) -> Trace:
        """Write these pages, with any page of the corpus."""
        for page in chosen:
            self.words.extend((page, self._rng.randrange(CORPUS_PAGES)))
        return self

    def read(self, chosen: Sequence[int]) -> Trace:
        """Read these pages back."""
        for page in chosen:
            self.words.extend((page, READ_BACK))
        return self

    def mixed(self, chosen: Sequence[int]) -> Trace:
        """Read or write each of these pages, one as often as the other."""
        for page in chosen:
            if self._rng.random() < 0.5:
                self.write([page])
            else:
                self.read([page])
        return self


@dataclass(frozen=True)
class Phase:
    """A part of a pattern. Its reads count unless it is only there to disturb."""

    trace: Trace
    warm_up: bool = False
    disturbs: bool = False
    frozen: bool = False  # puts are refused meanwhile


@dataclass(frozen=True)
class Pattern:
    """What comes after the cold pages."""

    name: str
    what: str
    phases: Callable[[random.Random], list[Phase]]
    fits: bool = True  # whether the pages in use would fit in RAM


def any_of(rng: random.Random, among: Sequence[int], n: int) -> list[int]:
    """Pages, each as likely as any other."""
    return rng.choices(among, k=n)


def zipf_of(rng: random.Random, among: Sequence[int], n: int) -> list[int]:
    """Pages by Zipf's law with exponent 1, in no order of address."""
    weights = list(accumulate(1 / rank for rank in range(1, len(among) + 1)))
    return rng.choices(shuffled(rng, among), cum_weights=weights, k=n)


def shuffled(rng: random.Random, among: Sequence[int]) -> list[int]:
    """The same pages in any order."""
    return rng.sample(among, len(among))


def hot(rng: random.Random) -> list[Phase]:
    warm = Trace(rng).write(shuffled(rng, HOT_PAGES)).mixed(any_of(rng, HOT_PAGES, HOT))
    return [Phase(warm, warm_up=True), Phase(Trace(rng).mixed(any_of(rng, HOT_PAGES, 6 * HOT)))]


def zipf(rng: random.Random) -> list[Phase]:
    order = zipf_of(rng, HOT_PAGES, 7 * HOT)
    warm = Trace(rng).write(shuffled(rng, HOT_PAGES)).mixed(order[:HOT])
    return [Phase(warm, warm_up=True), Phase(Trace(rng).mixed(order[HOT:]))]


def reread(rng: random.Random) -> list[Phase]:
    spilled = Trace(rng).write(shuffled(rng, HOT_PAGES))
    warm = Trace(rng).read(any_of(rng, HOT_PAGES, 3 * HOT))
    measured = Trace(rng).read(any_of(rng, HOT_PAGES, 6 * HOT))
    return [Phase(spilled, warm_up=True, frozen=True), Phase(warm, warm_up=True), Phase(measured)]


def scan(rng: random.Random) -> list[Phase]:
    warm = Trace(rng).write(shuffled(rng, HOT_PAGES)).mixed(any_of(rng, HOT_PAGES, 3 * HOT))
    once = Trace(rng).read(ALL_PAGES)
    return [
        Phase(warm, warm_up=True),
        Phase(once, disturbs=True),
        Phase(Trace(rng).mixed(any_of(rng, HOT_PAGES, 6 * HOT))),
    ]


def uniform(rng: random.Random) -> list[Phase]:
    warm = Trace(rng).write(shuffled(rng, HOT_PAGES))
    return [Phase(warm, warm_up=True), Phase(Trace(rng).mixed(any_of(rng, ALL_PAGES, 240_000)))]


PATTERNS: Final = (
    Pattern("hot", "a hot set, written and read, each page as often", hot),
    Pattern("zipf", "a hot set, written and read by Zipf's law", zipf),
    Pattern("reread", "a hot set that was spilled, then is only read", reread),
    Pattern("scan", "the hot set, and once in between everything is read", scan),
    Pattern("uniform", "everything, cold or not, each page as often", uniform, fits=False),
)


@dataclass(frozen=True)
class Result:
    """What a pattern cost on one device."""

    pattern: str
    mode: str
    hits: float  # share of reads from RAM, after the warm-up
    hits_whole: float  # the same over the whole, the warm-up included
    disk_writes_per_write: float  # pages written to the file for each page that was written to the device
    demotion_writes_per_put: float
    disk_reads: int
    seconds: float


class Device:
    """A served device, its loader and its pool."""

    def __init__(self, pool: Path, load: peers.Loader, place: peers.Place) -> None:
        self._pool, self._load, self._place = pool, load, place

    def run(self, phase: Phase) -> None:
        """Replay the phase."""
        with tempfile.NamedTemporaryFile(dir=self._place.pools) as file, self._pool.open("r+b") as pool:
            phase.trace.words.tofile(file)
            file.flush()
            poolfile.write_frozen(pool.fileno(), phase.frozen)
            self._load("replay", DEPTH, file.name)

    def counters(self) -> Counters:
        """As they are now."""
        with self._pool.open("rb") as pool:
            return poolfile.read_counters(pool.fileno(), self._pool)


def share(before: Counters, after: Counters) -> tuple[int, int]:
    """Pages read from RAM, and pages read."""
    gets = after.gets - before.gets
    return gets, gets + after.file_reads - before.file_reads


def measure(pattern: Pattern, mode: str, device: Device) -> Result:
    """Run a pattern on a device whose pool is full of cold pages."""
    start, first = time.monotonic(), device.counters()
    measured, whole = [0, 0], [0, 0]
    for phase in pattern.phases(random.Random(1)):
        before = device.counters()
        device.run(phase)
        found = share(before, device.counters())
        for counts, counted in ((whole, not phase.disturbs), (measured, not phase.disturbs and not phase.warm_up)):
            counts[0] += found[0] * counted
            counts[1] += found[1] * counted
    last = device.counters()
    demoted, written = last.demotion_writes - first.demotion_writes, last.writes - first.writes
    return Result(
        pattern.name, mode, measured[0] / measured[1], whole[0] / whole[1],
        (demoted + last.spills - first.spills) / max(written, 1), demoted / max(last.puts - first.puts, 1),
        last.file_reads - first.file_reads, time.monotonic() - start,
    )  # fmt: skip


@contextlib.contextmanager
def new_device(name: str, watermark: int | None, place: peers.Place) -> Iterator[Device]:
    """Serve a new device."""
    size = DEVICE_PAGES * pages.PAGE
    keys = {"name": name, "size": size, "backing": place.disk / name, "limit": LIMIT, "pools": place.pools}
    if watermark is not None:
        keys["watermark"] = f"{watermark}%"
    plugin = [str(peers.ROOT / "plugin" / "tmem.py"), *(f"{key}={value}" for key, value in keys.items())]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(peers.serving(peers.Peer(name, ["python", *plugin]), place))
        load = stack.enter_context(peers.loading(server, place))
        yield Device(place.pools / f"{name}.pool", load, place)


def run(place: peers.Place, patterns: Sequence[Pattern], modes: dict[str, int | None]) -> Iterator[Result]:
    """All patterns, on pools that are filled first and grow cold together."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as together:
        devices: dict[tuple[str, str], Device] = {}
        for pattern in patterns:
            for number, (mode, watermark) in enumerate(modes.items()):
                device = stack.enter_context(new_device(f"{pattern.name}-{number}", watermark, place))
                device.run(Phase(Trace(random.Random(0)).write(COLD_PAGES)))
                devices[pattern.name, mode] = device
        time.sleep(GROWN_COLD)
        for pattern in patterns:
            yield from together.map(
                lambda mode, pattern=pattern: measure(pattern, mode, devices[pattern.name, mode]), modes
            )


def render(results: Sequence[Result]) -> str:
    """A table for people."""
    lines = [
        "                            reads from RAM            to the disk, per",
        "                            warm     whole            write  put          seconds",
    ]
    lines += [
        f"{it.pattern:<9} {it.mode:<18} {it.hits:.1%} {it.hits_whole:>8.1%} {it.disk_writes_per_write:>16.2f}"
        f" {it.demotion_writes_per_put:>5.2f} {it.seconds:>14.1f}"
        for it in results
    ]
    legend = [f"{pattern.name:<9} {pattern.what}" for pattern in PATTERNS]
    return "\n".join([*lines, "", *legend])


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/inversion.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--only", choices=[pattern.name for pattern in PATTERNS], help="one pattern only")
    parser.add_argument("--watermark", type=int, help="percent of the target to keep free (default: the device's own)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    return parser.parse_args()


def main() -> int:
    """Measure and print; exit status 1 when a hot set that fits is not in RAM."""
    args = parse_args()
    patterns = [pattern for pattern in PATTERNS if args.only in (None, pattern.name)]
    modes = MODES | {"demote ahead": args.watermark}
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=TMPFS) as memory:
        subprocess.run(["make", "-s", "-C", str(HERE), f"BUILD={disk}"], check=True)
        corpus = args.corpus or Path(memory) / "corpus"
        if not args.corpus:
            pages.capture(corpus, CORPUS_PAGES)
        place = peers.Place(Path(disk) / "loader", corpus, Path(disk), Path(memory))
        results = list(run(place, patterns, modes))
    print(json.dumps([asdict(result) for result in results], indent=1) if args.json else render(results))
    inverted = [it for it in results if it.mode == "demote ahead" and it.hits < GOAL and named(it.pattern).fits]
    return 1 if inverted else 0


def named(name: str) -> Pattern:
    """The pattern of that name."""
    return next(pattern for pattern in PATTERNS if pattern.name == name)


if __name__ == "__main__":
    sys.exit(main())
