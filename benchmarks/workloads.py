# SPDX-License-Identifier: BSD-3-Clause
"""Record workloads: guests that share a host, played on real devices with real pages, for `tmemctl simulate`.

Each guest is a list of requests that a seed determines, each with its time: whatever policy holds, the same pages are
put, read and freed, as far as the disk keeps up.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Final, Literal

import nbd

from benchmarks import pages, peers
from tests.support import harness
from tmemd import protocol
from tmemd.daemonconfig import parse_config
from tmemd.governor.governor import TICK, Governor
from tmemd.operations import perform
from tmemd.policy import DEFAULT
from tmemd.settings import PoolSettings
from tmemd.simulation import recording
from tmemd.store.directory import Pools

PAGE: Final = 4096
BUDGET: Final = 96 << 20
LIMIT: Final = 512 << 20
CORPUS_PAGES: Final = 16384
TMPFS: Final = "/dev/shm"
RECORDINGS: Final = peers.ROOT / "benchmarks" / "recordings"

Op = Literal["put", "get", "free"]
Request = tuple[float, Op, int]  # seconds since the beginning, what, and the first page
FREED: Final = 512  # pages, with one request: a guest trims in clusters


class Guest:
    """Makes the requests of one guest, in the order of time."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.requests: list[Request] = []
        self.now = 0.0

    def sleep(self, until: float) -> None:
        """Do nothing until then."""
        self.now = max(self.now, until)

    def fill(self, first: int, n: int, rate: float) -> None:
        """Put *n* pages, in order, *rate* a second."""
        for page in range(first, first + n):
            self._request("put", page, rate)

    def get(self, page: int, rate: float) -> None:
        """Read one page."""
        self._request("get", page, rate)

    def use(self, choose: Callable[[], int], until: float, rate: float, writes: float = 0.3) -> None:
        """Read pages that *choose* chooses, at *rate*; the share *writes* of them is put again afterwards."""
        while self.now < until:
            page = choose()
            self._request("get", page, rate)
            if self.random.random() < writes:
                self._request("put", page, rate)

    def free(self, first: int, n: int) -> None:
        """Say that *n* pages are dead."""
        self.requests += [(self.now, "free", page) for page in range(first, first + n, FREED)]

    def uniform(self, first: int, n: int) -> Callable[[], int]:
        """Any of *n* pages."""
        return lambda: self.random.randrange(first, first + n)

    def window(self, n: int, of: int, speed: float) -> Callable[[], int]:
        """Any of *n* pages, which move on through *of* pages, *speed* of them a second."""
        return lambda: (int(self.now * speed) + self.random.randrange(n)) % of

    def zipf(self, n: int, exponent: float = 1.0) -> Callable[[], int]:
        """One of *n* pages, the k-th most popular as often as 1 / k ** exponent."""
        sums = list(accumulate(1 / k**exponent for k in range(1, n + 1)))
        order = list(range(n))
        self.random.shuffle(order)
        return lambda: order[bisect.bisect_left(sums, self.random.random() * sums[-1])]

    def _request(self, op: Op, page: int, rate: float) -> None:
        self.requests.append((self.now, op, page))
        self.now += 1 / rate


Guests = dict[str, list[Request]]


def phased() -> Guests:
    """Guests take turns being busy, each in a working set that would fit alone."""
    made = {}
    for number, name in enumerate("abc"):
        guest = Guest(f"phased {name}")
        for begin in (number * 18.0, number * 18.0 + 54.0) if number == 0 else (number * 18.0,):
            guest.sleep(begin)
            if not guest.requests:
                guest.fill(0, 36_000, 5000)
            guest.use(guest.uniform(0, 36_000), begin + 18, 3500)
        made[name] = guest.requests
    return made


def skewed() -> Guests:
    """Guests of different sizes, each with a few pages that are popular and many that are not."""
    made = {}
    for name, size, rate in (("large", 60_000, 2400), ("middle", 30_000, 1200), ("small", 15_000, 600)):
        guest = Guest(f"skewed {name}")
        guest.fill(0, size, size / 15)
        guest.use(guest.zipf(size), 75, rate)
        made[name] = guest.requests
    return made


def all_at_once() -> Guests:
    """Guests that start together, fill their memory, and then work in half of it."""
    made = {}
    for name in "abc":
        guest = Guest(f"all-at-once {name}")
        guest.fill(0, 40_000, 2000)
        guest.use(guest.uniform(0, 20_000), 75, 1300)
        made[name] = guest.requests
    return made


def idle_giant() -> Guests:
    """A giant fills the memory and sleeps, but for a page now and then, while two small guests work."""
    giant = Guest("idle-giant giant")
    giant.fill(0, 64_000, 6000)
    giant.use(giant.uniform(0, 64_000), 75, 20, writes=0)
    made = {"giant": giant.requests}
    for name in ("one", "two"):
        guest = Guest(f"idle-giant {name}")
        guest.sleep(14)
        guest.fill(0, 20_000, 2500)
        guest.use(guest.uniform(0, 20_000), 75, 1800)
        made[name] = guest.requests
    return made


def batch() -> Guests:
    """A server with a hot set that is popular unevenly, and a job that writes a lot and reads half of it back, once."""
    server = Guest("batch server")
    server.fill(0, 30_000, 3000)
    server.use(server.zipf(30_000, 0.8), 75, 2200)
    job = Guest("batch job")
    job.sleep(12)
    for first in range(0, 120_000, 30_000):
        job.fill(first, 30_000, 3500)
        for page in range(first, first + 30_000, 2):
            job.get(page, 3500)
    small = Guest("batch small")
    small.fill(0, 6_000, 1000)
    small.use(small.uniform(0, 6_000), 75, 500)
    return {"server": server.requests, "job": job.requests, "small": small.requests}


def leak() -> Guests:
    """A guest whose memory grows until it is restarted, twice, and two that are busy by day and by night in turn."""
    leaking = Guest("leak leaking")
    for _ in range(3):
        leaking.fill(0, 45_000, 2200)
        leaking.free(0, 45_000)
        leaking.sleep(leaking.now + 4)
    made = {"leaking": leaking.requests}
    for name, night in (("day", 0.0), ("night", 36.0)):
        guest = Guest(f"leak {name}")
        guest.fill(0, 25_000, 2500)
        for second in range(10, 75):
            busy = (second >= 36) == (night > 0)
            guest.use(guest.uniform(0, 25_000), second + 1, 2500 if busy else 100)
        made[name] = guest.requests
    return made


def builds() -> Guests:
    """Two build machines that fill memory, use it and free it, again and again, beside a server."""
    server = Guest("builds server")
    server.fill(0, 28_000, 3000)
    server.use(server.zipf(28_000, 0.9), 75, 1800)
    made = {"server": server.requests}
    for name, begin, size in (("even", 8.0, 26_000), ("odd", 15.0, 34_000)):
        guest = Guest(f"builds {name}")
        for at in (begin, begin + 24, begin + 48):
            guest.sleep(at)
            guest.fill(0, size, 5000)
            guest.use(guest.uniform(0, size), guest.now + 8, 2500)
            guest.free(0, size)
        made[name] = guest.requests
    return made


def scans() -> Guests:
    """A database that reads all it has from end to end every so often, and two servers with popular pages."""
    database = Guest("scans database")
    database.fill(0, 45_000, 4000)
    for begin in (18.0, 38.0, 58.0):
        database.use(database.zipf(45_000, 1.1), begin, 600)
        for page in range(45_000):
            database.get(page, 6000)
    made = {"database": database.requests}
    for name, size, rate in (("one", 24_000, 2200), ("two", 16_000, 1100)):
        guest = Guest(f"scans {name}")
        guest.fill(0, size, 2500)
        guest.use(guest.zipf(size, 0.9), 75, rate)
        made[name] = guest.requests
    return made


def sliding() -> Guests:
    """Guests that each work in a part of their memory, which stays, moves on slowly, or fast."""
    made = {}
    for name, speed in (("still", 0), ("slow", 300), ("fast", 900)):
        guest = Guest(f"sliding {name}")
        guest.fill(0, 50_000, 4000)
        guest.use(guest.window(24_000, 50_000, speed), 75, 1800)
        made[name] = guest.requests
    return made


def bursts() -> Guests:
    """Six guests that sleep, and wake up now and then for some seconds."""
    made = {}
    for name in ("a", "b", "c", "d", "e", "f"):
        guest = Guest(f"bursts {name}")
        guest.sleep(guest.random.uniform(0, 15))
        guest.fill(0, 20_000, 5000)
        while guest.now < 70:
            guest.use(guest.uniform(0, 20_000), guest.now + guest.random.uniform(3, 9), 2500)
            guest.sleep(guest.now + guest.random.uniform(4, 20))
        made[name] = guest.requests
    return made


# These were looked at while the policy was made; what else there is was recorded when it was settled.
TUNED: Final = ("phased", "skewed", "all-at-once", "idle-giant", "batch", "leak", "builds", "scans")
UNTUNED: Final = ("sliding", "bursts")

WORKLOADS: Final[dict[str, Callable[[], Guests]]] = {
    "phased": phased,
    "skewed": skewed,
    "all-at-once": all_at_once,
    "idle-giant": idle_giant,
    "batch": batch,
    "leak": leak,
    "builds": builds,
    "scans": scans,
    "sliding": sliding,
    "bursts": bursts,
}


@dataclass
class Player:
    """Plays one guest's requests on its device, and checks what it reads."""

    handle: nbd.NBD
    requests: list[Request]
    corpus: list[bytes]
    late: float = 0.0  # seconds behind the schedule, at worst
    error: BaseException | None = None

    def play(self, start: float, stop: threading.Event) -> None:
        """All requests, each at its time or as soon after as the device lets us."""
        try:
            self._play(start, stop)
        except BaseException as error:  # it is raised again in the main thread
            self.error = error
            stop.set()

    def _play(self, start: float, stop: threading.Event) -> None:
        versions: dict[int, int] = {}
        for at, op, page in self.requests:
            ahead = start + at - time.monotonic()
            if ahead > 0.002 and stop.wait(ahead):
                return
            self.late = max(self.late, -ahead)
            if op == "put":
                versions[page] = versions.get(page, 0) + 1
                self.handle.pwrite(self._content(page, versions[page]), page * PAGE)
            elif op == "get":
                found = self.handle.pread(PAGE, page * PAGE)
                if page in versions and found != self._content(page, versions[page]):
                    raise AssertionError(f"page {page} is wrong")
            else:
                self.handle.trim(FREED * PAGE, page * PAGE)
                for freed in range(page, page + FREED):
                    versions.pop(freed, None)

    def _content(self, page: int, version: int) -> bytes:
        return self.corpus[(page + version * 7919) % len(self.corpus)]


def read_corpus(path: Path) -> list[bytes]:
    """Pages of a file that benchmarks/pages.py made."""
    data = path.read_bytes()
    return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


@contextlib.contextmanager
def serving(name: str, size: int, disk: Path, pools: Path) -> Iterator[nbd.NBD]:
    """A device of that name; yields a connection to it."""
    run = disk / name
    run.mkdir()
    server = harness.Server(run, harness.device(name, pools, size, run / "backing", LIMIT))
    try:
        with server.start().client() as handle:
            yield handle
    finally:
        server.kill()


class Recorder:
    """A governor of tmemd's own over the pools of a directory, and a record of what it finds."""

    def __init__(self, directory: Path, policy: str, writer: recording.Writer) -> None:
        config = f'policy = "{policy}"\n[budget]\nminimum = "{BUDGET}"\nmaximum = "{BUDGET}"\nreserve = "0"\n'
        self._pools = Pools(directory, keep=True)
        self._pools.adopt_all()
        self._governor = Governor(self._pools, lambda _: PoolSettings(), parse_config(config))
        self._writer = writer

    def close(self) -> None:
        """Let go of the pools."""
        self._pools.close()

    def tick(self, at: float) -> None:
        """Record how it is, and set targets for what comes."""
        listed = perform(self._pools, protocol.List(long=True))
        assert isinstance(listed, protocol.Listed)
        records = tuple(map(recording.pool_record, listed.pools))
        self._governor.tick()
        self._writer.add(recording.Record(at=round(at, 3), budget_bytes=BUDGET, pools=records))


def play(handles: dict[str, nbd.NBD], guests: Guests, corpus: list[bytes], recorder: Recorder) -> None:
    """Play all guests to their end. Raises what went wrong with one of them."""
    stop, start = threading.Event(), time.monotonic()
    players = {name: Player(handles[name], requests, corpus) for name, requests in guests.items()}
    threads = [threading.Thread(target=player.play, args=(start + TICK, stop)) for player in players.values()]
    try:
        for thread in threads:
            thread.start()
        for number in count():
            stop.wait(max(0.0, start + number * TICK - time.monotonic()))
            recorder.tick(time.monotonic() - start)
            if not any(thread.is_alive() for thread in threads):
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for name, player in players.items():
        if player.error:
            raise RuntimeError(f"guest {name}: {player.error}")
        print(f"  {name}: {len(player.requests)} requests, at worst {player.late:.2f} s late", file=sys.stderr)


def run(guests: Guests, policy: str, corpus: list[bytes], output: Path) -> None:
    """Play *guests* under *policy* and record it to *output*."""
    size = (max(page for requests in guests.values() for _, _, page in requests) + FREED) * PAGE
    with contextlib.ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pools = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS)))
        handles = {name: stack.enter_context(serving(name, size, disk, pools)) for name in guests}
        writer = stack.enter_context(recording.Writer(output, recording.new_header(TICK, policy)))
        recorder = stack.enter_context(contextlib.closing(Recorder(pools, policy, writer)))
        play(handles, guests, corpus, recorder)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/workloads", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("workload", nargs="*", choices=[[], *WORKLOADS], help="which (default: all)")
    parser.add_argument("--policy", default="fair", help="that holds meanwhile (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before by benchmarks/pages.py")
    parser.add_argument("--output", type=Path, default=RECORDINGS, help="directory")
    return parser.parse_args()


def main() -> int:
    """Record as the command line asks."""
    args = parse_args()
    with contextlib.ExitStack() as stack:
        corpus = args.corpus
        if not corpus:
            corpus = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS))) / "pages"
            pages.capture(corpus, CORPUS_PAGES)
        content = read_corpus(corpus)
        args.output.mkdir(parents=True, exist_ok=True)
        for name in args.workload or WORKLOADS:
            print(name, file=sys.stderr)
            mark = "" if args.policy == DEFAULT else f".{args.policy.replace(':', '-')}"
            run(WORKLOADS[name](), args.policy, content, args.output / f"{name}{mark}.jsonl.xz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
