# SPDX-License-Identifier: BSD-3-Clause
"""Three guests want more RAM than there is: who gets how much, and how fast it changes hands.

Each guest is fio in a closed loop on a device of its own nbdkit; one tmemd gives them a fixed budget. Every few
milliseconds the pools' targets and use are read from their files. Pages with known content lie behind what fio uses.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support import fakes, leftovers
from tests.support.content import PAGE, content
from tests.support.harness import DEADLINE, MIB, Server, device, wait_until
from tmemd.store import poolfile

WEIGHTS: Final = {"light": 100, "middle": 200, "heavy": 400}
BUDGET: Final = 64 * MIB
SPAN: Final = 128 * MIB  # what fio works on: about 50 MiB once compressed, more than anybody's share
KEPT: Final = 1024  # pages of known content behind it
INTERVAL: Final = 0.002  # seconds between two samples
NEAR: Final = 0.05  # of a share
HOLD: Final = 3.0  # seconds for which the settled state is watched

LOAD: Final = ("--rw=randrw", "--bs=4k", "--iodepth=8", "--rwmixread=30", "--norandommap", "--rate_iops=4000,4000")
BURST: Final = ("--rw=write", "--bs=64k", "--iodepth=4")  # a guest that needs it all at once


@dataclass(frozen=True)
class Sample:
    """All pools at one moment; sizes in bytes by name."""

    at: float  # seconds, of the monotonic clock
    target: dict[str, int]
    used: dict[str, int]
    puts: dict[str, int]
    requests: dict[str, int]  # reads, writes and trims


@dataclass
class Sampler:
    """Reads the pools' files every *interval* seconds, by default as fast as it can be done beside the load."""

    pools: Mapping[str, Path]
    interval: float = INTERVAL
    samples: list[Sample] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample for the length of a with block."""
        stop = threading.Event()
        with contextlib.ExitStack() as files:
            fds = {name: files.enter_context(path.open("rb")).fileno() for name, path in self.pools.items()}
            self._sample(fds)
            thread = threading.Thread(target=self._run, args=(fds, stop))
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _run(self, fds: Mapping[str, int], stop: threading.Event) -> None:
        while not stop.wait(self.interval):
            self._sample(fds)

    def _sample(self, fds: Mapping[str, int]) -> None:
        counters = {name: poolfile.read_counters(fd, name) for name, fd in fds.items()}
        target = {name: poolfile.read_control(fd).target or 0 for name, fd in fds.items()}
        used = {name: each.used_bytes for name, each in counters.items()}
        puts = {name: each.puts for name, each in counters.items()}
        requests = {name: each.reads + each.writes + each.trims for name, each in counters.items()}
        self.samples.append(Sample(time.monotonic(), target, used, puts, requests))

    def since(self, moment: float) -> list[Sample]:
        """The samples from that moment on."""
        return [sample for sample in self.samples if sample.at >= moment]

    def until(self, ready: Callable[[Sample], bool], what: str, *, hold: float = 0) -> float:
        """Wait until *ready* is true of every sample for *hold* seconds; the moment from which it was."""
        state: dict[str, Any] = {"seen": len(self.samples) - 1, "since": None}

        def held() -> bool:
            for sample in self.samples[state["seen"] :]:
                if not ready(sample):
                    state["since"] = None
                elif state["since"] is None:
                    state["since"] = sample.at
            state["seen"] = len(self.samples) - 1
            return state["since"] is not None and self.samples[-1].at - state["since"] >= hold

        wait_until(held, what)
        moment: float = state["since"]
        return moment


class Guest:
    """A device, and fio as the guest that uses it."""

    def __init__(self, name: str, run: Path, tmemd: fakes.Tmemd) -> None:
        """Serve a device with a pool of that *tmemd*."""
        size = SPAN + KEPT * PAGE
        parameters = device(name, tmemd.directory, size, run / "backing", 2 * size, tmemd=tmemd.socket)
        self.name = name
        self.pool = tmemd.directory / f"{name}.pool"
        self._server = Server(run, parameters, ("--threads", "8")).start()
        self._fio: subprocess.Popen[bytes] | None = None

    def write(self) -> None:
        """Write the pages of known content."""
        with self._server.client() as client:
            for page in range(KEPT):
                client.pwrite(content(page, 1), SPAN + page * PAGE)

    def wrong(self) -> int:
        """How many of them are not what was written."""
        with self._server.client() as client:
            return sum(client.pread(PAGE, SPAN + page * PAGE) != content(page, 1) for page in range(KEPT))

    def begin(self, load: Sequence[str] = LOAD) -> None:
        """Use the device until `end`."""
        command = [
            "fio", "--name=guest", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={self._server.socket}",
            f"--size={SPAN}", "--time_based", "--runtime=600", "--refill_buffers", "--buffer_compress_percentage=65",
            "--randrepeat=0", "--output=/dev/null", *load,
        ]  # fmt: skip
        command = leftovers.dying_with_us(command)
        self._fio = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self) -> None:
        """Stop using it. Not by SIGKILL: nbdkit 1.32 may abort when a client goes amid its requests."""
        if self._fio:
            self._fio.terminate()
            self._fio.wait(DEADLINE)

    def trim(self) -> None:
        """Give all pages back, as a guest does when the process that they were of ends."""
        with self._server.client() as client:
            for offset in range(0, SPAN, 32 * MIB):
                client.trim(min(32 * MIB, SPAN - offset), offset)

    def close(self) -> None:
        """End everything."""
        self.end()
        self._server.kill()


def configuration(caps: Mapping[str, int], minimums: Mapping[str, int]) -> str:
    """The configuration file of tmemd: a budget that the host cannot change, and the guests' settings."""
    lines = ["[budget]", f"minimum = {BUDGET}", f"maximum = {BUDGET}", 'reserve = "0%"']
    for name, weight in WEIGHTS.items():
        lines += [f"[pools.{name}]", f"weight = {weight}"]
        lines += [f"{key} = {sizes[name]}" for key, sizes in (("cap", caps), ("minimum", minimums)) if name in sizes]
    return "\n".join(lines)


@contextlib.contextmanager
def three_guests(caps: Mapping[str, int], minimums: Mapping[str, int]) -> Iterator[dict[str, Guest]]:
    """A tmemd and the guests, whose pages of known content are written; none does anything else yet."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(leftovers.directory("/var/tmp"))
        base = stack.enter_context(leftovers.directory("/dev/shm"))
        tmemd = stack.enter_context(fakes.tmemd(base, config=configuration(caps, minimums)))
        guests = {}
        for name in WEIGHTS:
            (disk / name).mkdir()
            guests[name] = Guest(name, disk / name, tmemd)
            stack.callback(guests[name].close)
        for guest in guests.values():
            guest.write()
        yield guests


def shares(names: Sequence[str]) -> dict[str, float]:
    """What each of these gets of the budget, in bytes, when they all want more."""
    total = sum(WEIGHTS[name] for name in names)
    return {name: BUDGET * WEIGHTS[name] / total for name in names}


def near(sizes: Mapping[str, int], wanted: Mapping[str, float]) -> bool:
    """Whether each of *wanted* is reached within NEAR."""
    return all(abs(sizes[name] - want) <= NEAR * want for name, want in wanted.items())


def reached(sizes: Mapping[str, int], wanted: Mapping[str, float]) -> bool:
    """Whether each of *wanted* is reached, or exceeded, within NEAR."""
    return all(sizes[name] >= (1 - NEAR) * want for name, want in wanted.items())


def violations(samples: Sequence[Sample], caps: Mapping[str, int], minimums: Mapping[str, int]) -> list[str]:
    """The samples in which somebody uses more than his cap, or may use less than his minimum."""
    found = []
    for sample in samples:
        found += [f"{name} uses {sample.used[name]} of {cap}" for name, cap in caps.items() if sample.used[name] > cap]
        found += [
            f"{name} has a target of {sample.target[name]}, below {minimum}"
            for name, minimum in minimums.items()
            if sample.target[name] < minimum
        ]
    return found


def others_have_the_rest(sample: Sample) -> bool:
    """Whether what the heaviest does not use is the others'."""
    rest = BUDGET - sample.used["heavy"]
    return (
        sample.used["heavy"] < NEAR * BUDGET and sample.target["light"] + sample.target["middle"] >= (1 - NEAR) * rest
    )


def hand_over(guests: Mapping[str, Guest], sampler: Sampler) -> dict[str, float]:
    """One guest frees its pages, then needs them again: seconds until RAM has changed hands, in targets and in use."""
    heavy = guests["heavy"]
    heavy.end()
    heavy.trim()
    freed = time.monotonic()
    given = sampler.until(others_have_the_rest, "the others to get what was freed") - freed
    puts = sampler.samples[-1].puts["heavy"]
    heavy.begin(BURST)
    wanted = sampler.until(lambda sample: sample.puts["heavy"] > puts, "the first put")
    own = {"heavy": shares(list(WEIGHTS))["heavy"]}
    target = sampler.until(lambda sample: reached(sample.target, own), "the target to come back") - wanted
    used = sampler.until(lambda sample: reached(sample.used, own), "the memory to come back") - wanted
    return {"given_s": given, "target_back_s": target, "used_back_s": used}


def off_weights(sizes: Mapping[str, float], weights: Mapping[str, int] = WEIGHTS) -> dict[str, float]:
    """How far each one's part of all these sizes is from its part of all weights, as a share of that.

    Unlike a comparison with shares of the budget this knows nothing of the room that all keep free alike.
    """
    whole, weight = sum(sizes.values()), sum(weights.values())
    return {name: size / whole / (weights[name] / weight) - 1 for name, size in sizes.items()}


def mean_use(samples: Sequence[Sample]) -> dict[str, float]:
    """What each used on average, in bytes."""
    return {name: sum(sample.used[name] for sample in samples) / len(samples) for name in samples[0].used}


def in_proportion(sample: Sample) -> bool:
    """Whether what all use is most of the budget, and parted by weights within NEAR."""
    return sum(sample.used.values()) >= 0.85 * BUDGET and all(
        abs(off) <= NEAR for off in off_weights(sample.used).values()
    )


def settled(samples: Sequence[Sample]) -> dict[str, Any]:
    """What these samples of a settled state show, sizes as shares of the budget or of a target."""
    use = mean_use(samples)
    return {
        "off_weights": off_weights(use),
        "used": sum(use.values()) / BUDGET,
        "above_target": {name: max(each.used[name] / each.target[name] for each in samples) - 1 for name in use},
    }


def measure(caps: Mapping[str, int] | None = None, minimums: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Contention, a hand-over, and what the pages of known content are at the end. Caps and minimums in bytes."""
    caps, minimums = caps or {}, minimums or {}
    with three_guests(caps, minimums) as guests:
        sampler = Sampler({name: guest.pool for name, guest in guests.items()})
        with sampler.running():
            start = time.monotonic()
            for guest in guests.values():
                guest.begin()
            result: dict[str, Any] = {}
            if not caps and not minimums:
                wanted = shares(list(WEIGHTS))
                targets = sampler.until(lambda sample: near(sample.target, wanted), "targets by weight", hold=1)
                used = sampler.until(in_proportion, "use by weight", hold=0.5)
                begin = time.monotonic()
                time.sleep(HOLD)
                result |= {"targets_settled_s": targets - start, "used_settled_s": used - start}
                result["settled"] = settled(sampler.since(begin))
                result |= hand_over(guests, sampler)
            else:
                sampler.until(lambda sample: sum(sample.used.values()) > BUDGET * 0.9, "contention", hold=HOLD)
                for guest in guests.values():
                    guest.end()
                    guest.trim()
                    guest.begin()
                sampler.until(lambda sample: sum(sample.used.values()) > BUDGET * 0.9, "contention again", hold=HOLD)
        for guest in guests.values():
            guest.end()
        result["wrong_pages"] = sum(guest.wrong() for guest in guests.values())
    last = sampler.samples[-1]
    result |= {"target": last.target, "used": last.used, "samples": len(sampler.samples)}
    gaps = [after.at - before.at for before, after in zip(sampler.samples, sampler.samples[1:], strict=False)]
    result["sample_interval_ms"] = {"median": sorted(gaps)[len(gaps) // 2] * 1e3, "most": max(gaps) * 1e3}
    result["violations"] = violations(sampler.samples, caps, minimums)
    return result


def render(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    lines = [
        f"{name}: {result['target'][name] / MIB:.1f} MiB target, {used / MIB:.1f} used"
        for name, used in result["used"].items()
    ]
    if known := result.get("settled"):
        lines += [f"{name}: part of RAM off its weight by {off:+.1%}" for name, off in known["off_weights"].items()]
        lines.append(
            f"all use {known['used']:.1%} of the budget; at most {max(known['above_target'].values()):+.1%} over target"
        )
    lines += [f"{key}: {value:.2f}" for key, value in result.items() if key.endswith("_s")]
    lines.append(
        f"{result['samples']} samples, {result['wrong_pages']} wrong pages, {len(result['violations'])} violations"
    )
    return "\n".join(lines)
