# SPDX-License-Identifier: BSD-3-Clause
"""A process on the host takes its RAM: do copies of a cache device go first, and how fast?

Serves a swap device and a cache device from a tmemd, fills both, and lets readers verify both all the time. Then a
process takes so much that three quarters of the copies must go, and after that so much that they do not suffice.
Pages do not compress, so that what tmpfs gives back is what leaves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbd

from benchmarks.pressure import fill
from tests.support import fakes
from tests.support.content import PAGE, incompressible
from tests.support.harness import Server, cache_device, connect, device, taken, wait_until
from tests.support.memoryhog import MemoryHog
from tmemd.governor.host import read_memory

MIB: Final = 1 << 20
GIB: Final = 1 << 30
RUN: Final = 256  # pages of a request that fills
LOOK: Final = 0.002  # seconds between two looks at the pools
NOISE: Final = 256 << 10  # bytes by which a pool moves anyhow
PAUSE: Final = 0.1  # seconds; a longer one is a wait for the next target, which comes twice a second
SETTLE: Final = 5.0  # seconds
ROOM: Final = GIB  # what the process may take before anything is lacking
CONFIG: Final = "[budget]\nminimum = '64M'\nmaximum = {}\nreserve = '{}'\npressure = 100\n"


class Look(NamedTuple):
    """What the pools take of tmpfs at one moment, in bytes."""

    seconds: float
    cache: int
    swap: int


class Watch(threading.Thread):
    """Looks at both pools all the time."""

    def __init__(self, cache: Path, swap: Path) -> None:
        super().__init__(daemon=True)
        self._files = cache, swap
        self._over = threading.Event()
        self.looks = [self.look()]

    def look(self) -> Look:
        """One look, now."""
        return Look(time.monotonic(), *map(taken, self._files))

    def run(self) -> None:
        """Until `end`."""
        while not self._over.wait(LOOK):
            self.looks.append(self.look())

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()


def falling(looks: list[Look]) -> tuple[int, float]:
    """The bytes of the cache pool that were given back, and the seconds that it took, short pauses included."""
    given, seconds, last = 0, 0.0, 0.0
    for before, now in pairwise(looks):
        if now.cache < before.cache - NOISE:
            given += before.cache - now.cache
            seconds += now.seconds - (last if now.seconds - last < PAUSE else before.seconds)
            last = now.seconds
    return given, seconds


def read(socket: Path, name: str, n_pages: int, over: Event, wrong: SimpleQueue[str]) -> None:
    """Read and verify pages at random until it is over."""
    client, rng = connect(socket, name), random.Random(name)
    while not over.is_set():
        page = rng.randrange(n_pages)
        try:
            if client.pread(PAGE, page * PAGE) != incompressible(page, 1):
                wrong.put(f"{name}: page {page} is wrong")
        except Exception as error:
            wrong.put(f"{name}: page {page}: {error}")


def make_image(path: Path, n_pages: int) -> None:
    """A source whose pages do not compress."""
    with path.open("wb") as image:
        for page in range(n_pages):
            image.write(incompressible(page, 1))


def read_all(client: nbd.NBD, n_pages: int) -> None:
    """Read from end to end."""
    for first in range(0, n_pages, RUN):
        client.pread(min(RUN, n_pages - first) * PAGE, first * PAGE)


def read_in(server: Server, tmemd: fakes.Tmemd, n_pages: int) -> None:
    """Read the image until tmem has all of it."""
    client = connect(server.socket, "golden")

    def all_read() -> bool:
        read_all(client, n_pages)
        return tmemd.client.pool("golden").counters.pages_in_tmem == n_pages

    wait_until(all_read, "all of the image to be in tmem")


def take(hog: MemoryHog, nbytes: int, watch: Watch) -> dict[str, float]:
    """Let the process hold so many bytes; what the pools gave for that."""
    start, began = len(watch.looks) - 1, time.monotonic()
    hog.hold(nbytes)
    held = time.monotonic()
    time.sleep(SETTLE)
    looks = watch.looks[start:]
    given, seconds = falling(looks)
    return {
        "hog_seconds": round(held - began, 2),
        "cache_before_mib": looks[0].cache // MIB,
        "cache_after_mib": looks[-1].cache // MIB,
        "swap_before_mib": looks[0].swap // MIB,
        "swap_after_mib": looks[-1].swap // MIB,
        "copies_given_back_mib": given // MIB,
        "copies_given_back_gib_per_s": round(given / GIB / seconds, 2) if seconds else 0.0,
    }


def lacking(reserve: int) -> dict[str, float]:
    """How far below the reserve the host is now; other processes may have taken something as well."""
    return {"lacking_after_mib": (reserve - read_memory()[0].available) // MIB}


def run(arguments: argparse.Namespace, held: ExitStack) -> dict[str, object]:
    """The whole story, as figures."""
    base = held.enter_context(fakes.on_tmpfs())
    disk = Path(held.enter_context(tempfile.TemporaryDirectory(dir=arguments.disk)))
    cache, swap = arguments.cache * MIB, arguments.swap * MIB
    make_image(disk / "image", cache // PAGE)
    reserve = read_memory()[0].available - ROOM - cache - swap
    config = CONFIG.format(2 * (cache + swap), reserve)
    tmemd = held.enter_context(fakes.tmemd(base, config=config))
    pools, keys = base / "pools", {"tmemd": base / "socket"}
    server = Server(disk, [
        *device("web", pools, swap, disk / "web", 2 * swap, **keys),
        *cache_device("golden", pools, disk / "image", 2 * cache, **keys),
    ])  # fmt: skip
    held.callback(server.kill)
    server.start()
    fill(server.socket, "web", swap // PAGE, 1)
    read_in(server, tmemd, cache // PAGE)
    for name, nbytes in (("web", swap), ("golden", cache)):  # so that all were used as lately
        read_all(connect(server.socket, name), nbytes // PAGE)
    over = multiprocessing.Event()
    wrong: SimpleQueue[str] = multiprocessing.SimpleQueue()
    for name, nbytes in (("golden", cache), ("web", swap)):
        reader = multiprocessing.Process(target=read, args=(server.socket, name, nbytes // PAGE, over, wrong))
        reader.start()
        held.callback(reader.join)
    held.callback(over.set)
    watch = Watch(pools / "golden.pool", pools / "web.pool")
    watch.start()
    held.callback(watch.end)
    with MemoryHog() as hog:
        # What is available now lies above the reserve by ROOM, more or less.
        above = read_memory()[0].available - reserve
        copies = take(hog, above + cache * 3 // 4, watch) | lacking(reserve)
        both = take(hog, above + cache + swap // 2, watch) | lacking(reserve)
    return {
        "three_quarters_of_the_copies": copies,
        "more_than_the_copies": both,
        "wrong": [] if wrong.empty() else [wrong.get()],
        "io_errors": sum(pool.counters.io_errors for pool in tmemd.client.pools()),
    }


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=int, default=2048, help="MiB of the cache device")
    parser.add_argument("--swap", type=int, default=512, help="MiB of the swap device")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="where to keep source and backing file")
    arguments = parser.parse_args()
    with ExitStack() as held:
        result = run(arguments, held)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
