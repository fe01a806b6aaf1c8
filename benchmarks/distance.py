# SPDX-License-Identifier: BSD-3-Clause
"""Does RAM go where a page of it saves most time? Two guests ask for the same, one of a near file, one of a far one.

The far file is an export of an nbdkit that answers each read after a while. Both guests fill their memory and then read
pages of which some are popular, at a steady pace, once under `fair` and once under `fair` that takes all files to be as
near. What is measured is how long the guests wait for what they read, from when the popular pages are known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Final

import nbd

from benchmarks import pages
from benchmarks.workloads import CORPUS_PAGES, FREED, LIMIT, PAGE, TMPFS, Guest, Player, Request, read_corpus
from tests.support import harness
from tmemd import operations
from tmemd.cli import common
from tmemd.daemonconfig import parse_config
from tmemd.governor.governor import TICK, Governor
from tmemd.protocol import PoolStatus
from tmemd.settings import PoolSettings
from tmemd.store.directory import Pools

PAGES: Final = 20_000
FILL: Final = 2500  # pages a second
RATE: Final = 400  # reads a second
SETTLED: Final = 60.0  # seconds after which waiting counts: RAM comes to a pool as fast as it reads its pages back
GUESTS: Final = ("near", "far")


@dataclass
class Waited:
    """How long one guest waited for its reads."""

    reads: int = 0
    seconds: float = 0.0


class Waiter(Player):
    """Plays requests and knows how long its reads took."""

    def __init__(self, handle: nbd.NBD, requests: list[Request], corpus: list[bytes]) -> None:
        super().__init__(handle, requests, corpus)
        self.waited = Waited()
        self.handle = self  # it stands between
        self._device = handle
        self._began = time.monotonic()

    def pread(self, size: int, offset: int) -> bytearray:
        """Read, and note how long that takes."""
        began = time.monotonic()
        data = self._device.pread(size, offset)
        if began - self._began > SETTLED:
            self.waited.reads += 1
            self.waited.seconds += time.monotonic() - began
        return data  # type: ignore[no-any-return]

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write."""
        self._device.pwrite(data, offset)


def requests(seconds: float) -> list[Request]:
    """What each of the guests asks for."""
    guest = Guest("distance")
    guest.fill(0, PAGES, FILL)
    guest.use(guest.zipf(PAGES, 0.7), SETTLED + seconds, RATE, writes=0.1)
    return guest.requests


@contextlib.contextmanager
def far_file(folder: Path, size: int, delay: str) -> Iterator[str]:
    """The URI of a file each of whose reads takes that long, and writes as well."""
    socket, file = folder / "far.socket", folder / "far.disk"
    file.touch()
    file.chmod(0o600)
    with file.open("rb+") as opened:
        opened.truncate(size)
    command = [
        "nbdkit",
        "-f",
        "-U",
        str(socket),
        "--filter=delay",
        "file",
        str(file),
        f"rdelay={delay}",
        f"wdelay={delay}",
    ]
    with subprocess.Popen(command) as process:
        try:
            while not socket.exists():
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.kill()


@contextlib.contextmanager
def device(name: str, folder: Path, pools: Path, backing: str) -> Iterator[nbd.NBD]:
    """A connection to a device of that name with that backing."""
    size = (PAGES + FREED) * PAGE
    bitmap = {"bitmap": folder / f"{name}.map"} if "://" in backing else {}
    run = folder / name
    run.mkdir()
    server = harness.Server(run, harness.device(name, pools, size, backing, LIMIT, **bitmap))
    try:
        with server.start().client() as handle:
            yield handle
    finally:
        server.kill()


def govern(pools: Pools, budget: int, threads: list[threading.Thread]) -> list[dict[str, PoolStatus]]:
    """Set targets until all threads have ended; returns the pools as they were when it had settled, and are then."""
    config = f'[budget]\nminimum = "{budget}"\nmaximum = "{budget}"\nreserve = "0"\n'
    governor = Governor(pools, lambda _: PoolSettings(), parse_config(config))
    start = time.monotonic()
    looks: list[dict[str, PoolStatus]] = []
    for number in count():
        time.sleep(max(0.0, start + number * TICK - time.monotonic()))
        governor.tick()
        if not looks and number * TICK >= SETTLED:
            looks.append({status.name: status for status in operations.statuses(pools)})
        if not any(thread.is_alive() for thread in threads):
            break
    return [*looks, {status.name: governor.measured(status) for status in operations.statuses(pools)}]


def measure(corpus: list[bytes], args: argparse.Namespace, *, knows_distance: bool) -> dict[str, Any]:
    """One run: of each guest how long it waited, and its target at the end."""
    fair: Any = import_module("tmemd.policy.fair")
    most, asked = fair._MOST, requests(args.seconds)
    fair._MOST = most if knows_distance else 1.0
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, fair, "_MOST", most)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.directory)))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS)))
        uri = stack.enter_context(far_file(folder, (PAGES + FREED) * PAGE, args.delay))
        backings = {"near": str(folder / "near.backing"), "far": uri}
        handles = {name: stack.enter_context(device(name, folder, place, backings[name])) for name in GUESTS}
        pools = stack.enter_context(contextlib.closing(Pools(place, keep=True)))
        pools.adopt_all()
        stop, start = threading.Event(), time.monotonic()
        players = {name: Waiter(handle, asked, corpus) for name, handle in handles.items()}
        threads = [threading.Thread(target=player.play, args=(start, stop)) for player in players.values()]
        stack.callback(stop.set)
        for thread in threads:
            thread.start()
        settled, known = govern(pools, args.budget << 20, threads)
    if errors := [player.error for player in players.values() if player.error]:
        raise errors[0]
    return {
        name: asdict(player.waited)
        | {"target_bytes": known[name].target_bytes, "miss_seconds": known[name].miss_seconds}
        | {"misses": known[name].counters.file_reads - settled[name].counters.file_reads}
        for name, player in players.items()
    }


def main() -> int:
    """Measure both, in turn, and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/distance", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--delay", default="1ms", help="of the far file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="that count (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=32, help="MiB of RAM for both (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=TMPFS, help="for the files (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=TMPFS) as folder:
        pages.capture(Path(folder) / "pages", CORPUS_PAGES)
        corpus = read_corpus(Path(folder) / "pages")
    found = [
        (knows, measure(corpus, args, knows_distance=knows)) for _ in range(args.rounds) for knows in (False, True)
    ]
    if args.json:
        print(json.dumps([{"knows_distance": knows, **result} for knows, result in found]))
        return 0
    table = common.table("", "NEAR WAITS", "FAR WAITS", "BOTH", "NEAR HAS", "FAR HAS", "NEAR MISSES", "FAR MISSES")
    for knows, result in found:
        of = [result[name] for name in GUESTS]
        waits = [each["seconds"] for each in of]
        table.add_row(
            "fair" if knows else "all taken to be near",
            *(f"{wait:.2f} s" for wait in (*waits, sum(waits))),
            *(f"{each['target_bytes'] >> 20} MiB" for each in of),
            *(f"{each['misses']} of {(each['miss_seconds'] or 0) * 1e6:.0f} us" for each in of),
        )
    common.print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
