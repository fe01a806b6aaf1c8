# SPDX-License-Identifier: BSD-3-Clause
"""A process on the host suddenly takes most of its RAM: how fast do pools give theirs back, and is all still right?

Serves devices from a tmemd with its usual budget, fills them, lets a process take what is available less --leave, and
reports when the reserve was kept again, what it fell to, and what every page held before and after.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import fakes
from tests.support.content import PAGE, incompressible
from tests.support.harness import Server, connect, device, taken
from tests.support.memoryhog import MemoryHog
from tmemd.governor.host import Stalls, read_memory

MIB = 1 << 20
RUN = 64  # pages of a request


def fill(socket: Path, name: str, n_pages: int, version: int) -> None:
    """Write every page."""
    client = connect(socket, name)
    for first in range(0, n_pages, RUN):
        client.pwrite(b"".join(incompressible(page, version) for page in range(first, first + RUN)), first * PAGE)


def verify(socket: Path, name: str, n_pages: int, version: int) -> None:
    """Read every page; SystemExit when one is wrong."""
    client = connect(socket, name)
    for first in range(0, n_pages, RUN):
        expected = b"".join(incompressible(page, version) for page in range(first, first + RUN))
        if client.pread(RUN * PAGE, first * PAGE) != expected:
            raise SystemExit(f"{name}: wrong data at page {first} or soon behind it")


def for_each(devices: list[str], what: Callable[..., None], server: Server, n_pages: int, version: int) -> bool:
    """Do it for all devices at once, in a process each; True when all went well."""
    processes = [multiprocessing.Process(target=what, args=(server.socket, name, n_pages, version)) for name in devices]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


class Watch(threading.Thread):
    """Looks at the host and the pools ten times a second."""

    def __init__(self, files: list[Path], reserve: int) -> None:
        super().__init__(daemon=True)
        self._files = files
        self.reserve = reserve
        self.rows: list[dict[str, float]] = []
        self._over = threading.Event()
        self._start = time.monotonic()

    def run(self) -> None:
        """Until `end`."""
        while not self._over.wait(0.1):
            memory = read_memory()[0]
            stalls = memory.stalls or Stalls(0, 0)
            self.rows.append({
                "seconds": round(self.seconds(), 2),
                "available_mib": memory.available // MIB,
                "pools_mib": sum(map(taken, self._files)) // MIB,
                "some_us": stalls.some_us,
            })  # fmt: skip

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()

    def until(self, ready: Callable[[dict[str, float]], bool], patience: float) -> float | None:
        """Seconds until a new row is *ready*; None when none was in that time."""
        began, seen = self.seconds(), len(self.rows)
        while self.seconds() - began < patience:
            for row in self.rows[seen:]:
                if ready(row):
                    return round(row["seconds"] - began, 2)
            seen = len(self.rows)
            time.sleep(0.02)
        return None


def run(arguments: argparse.Namespace, held: ExitStack) -> dict[str, object]:
    """The whole story, as figures."""
    base = held.enter_context(fakes.on_tmpfs())
    disks = Path(held.enter_context(tempfile.TemporaryDirectory(dir=arguments.disk)))
    names = [f"guest{n}" for n in range(arguments.devices)]
    size, n_pages = arguments.size * MIB, arguments.size * MIB // PAGE
    tmemd = held.enter_context(fakes.tmemd(base, config=arguments.config.read_text() if arguments.config else ""))
    keys = {"tmemd": base / "socket"}
    server = Server(disks, [
        word for name in names for word in device(name, base / "pools", size, disks / name, size, **keys)
    ])  # fmt: skip
    held.callback(server.kill)
    server.start()
    reserve = tmemd.client.host().reserve_bytes
    watch = Watch([base / "pools" / f"{name}.pool" for name in names], reserve)
    watch.start()
    held.callback(watch.end)
    if not for_each(names, fill, server, n_pages, 1):
        raise SystemExit("the devices could not be filled")
    time.sleep(3)
    before = watch.rows[-1]
    with MemoryHog() as hog:
        available = read_memory()[0].available
        hog_bytes = available - arguments.leave * MIB
        hog.hold(hog_bytes)
        there = watch.seconds()
        kept = watch.until(lambda row: row["available_mib"] >= reserve // MIB, 300)
        time.sleep(5)
        after = watch.rows[-1]
        right = for_each(names, verify, server, n_pages, 1)
        status = tmemd.client.host()
        demoted = sum(pool.counters.demotions for pool in tmemd.client.pools())
    began = watch.seconds()
    growing = watch.until(lambda _: tmemd.client.host().targets_bytes > status.targets_bytes, 60)
    back = watch.until(lambda _: tmemd.client.host().budget_bytes >= before["pools_mib"] * MIB, 120)
    lowest = min(
        (row for row in watch.rows if row["seconds"] < there + (kept or 300)), key=lambda r: r["available_mib"]
    )
    result = {
        "devices": arguments.devices,
        "device_mib": arguments.size,
        "reserve_mib": reserve // MIB,
        "hog_mib": hog_bytes // MIB,
        "pools_before_mib": before["pools_mib"],
        "available_lowest_mib": lowest["available_mib"],
        "reserve_kept_again_s": kept,
        "pools_after_mib": after["pools_mib"],
        "budget_after_mib": status.budget_bytes // MIB,
        "available_after_mib": after["available_mib"],
        "pages_demoted": demoted,
        "pages_right": right,
        "growing_again_s": growing,
        "budget_back_s": None if back is None else round(watch.seconds() - began, 2),
        "refilled_and_right": for_each(names, fill, server, n_pages, 2) and for_each(names, verify, server, n_pages, 2),
        "errors": sum(pool.counters.io_errors + pool.counters.bad_checksums for pool in tmemd.client.pools()),
    }
    if arguments.rows:
        arguments.rows.write_text(json.dumps(watch.rows))
    return result


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024, help="MiB of each device")
    parser.add_argument("--leave", type=int, default=1024, help="MiB that the process leaves available")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where to keep backing files")
    parser.add_argument("--config", type=Path, help="configuration of tmemd")
    parser.add_argument("--rows", type=Path, help="write all that was seen to this file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    with ExitStack() as held:
        result = run(arguments, held)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
