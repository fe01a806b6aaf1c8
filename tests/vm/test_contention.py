# SPDX-License-Identifier: BSD-3-Clause
"""Three real guests at once want more RAM than there is: it follows their weights, and every page comes back right."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import fakes, leftovers, uml
from tests.support.contention import Sample, Sampler, mean_use, off_weights
from tests.support.harness import MIB, Server, device
from tests.support.verdict import HarnessError, guest_faults, is_idle, second_chance

WEIGHTS = {"light": 100, "middle": 200, "heavy": 400}
BUDGET = 21 * MIB
DEVICE = 512 * MIB
MEMORY, HOG = "96M", 165  # of a guest; MiB that its workload takes
GUEST_SECONDS = 400
LEAST_SECONDS = 3.0  # of contention, to judge by
NEAR = 0.05
SPAN = 256 << 10  # what a pool takes for one size class; to the lightest that is 8 % of its share

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200), *uml.needs_uml]


def share(name: str) -> float:
    return BUDGET * WEIGHTS[name] / sum(WEIGHTS.values())


def guest(server: Server, name: str, directory: Path) -> tuple[str, int]:
    """A guest that swaps on its device as long as its workload lasts: what it said, and its exit status."""
    directory.mkdir()
    with uml.disk(directory, server.socket, name) as disk:
        return uml.swap_on(directory, disk, MEMORY, "tests/vm/workload", "build/hog", str(HOG), seconds=GUEST_SECONDS)


def contended(samples: list[Sample]) -> list[Sample]:
    """From when all have had their share for the first time until the first of them ends, which frees its pages."""
    begin = next((i for i, each in enumerate(samples) if all(each.used[n] > 0.9 * share(n) for n in WEIGHTS)), None)
    assert begin is not None, "they never all had their shares"
    rest = samples[begin:]
    end = next((i for i, each in enumerate(rest) if any(each.used[n] < 0.5 * share(n) for n in WEIGHTS)), len(rest))
    if rest[end - 1].at - rest[0].at < LEAST_SECONDS:
        raise HarnessError("the guests hardly ran at the same time")
    return rest[:end]


def swap_in_three_guests() -> list[Sample]:
    """What was seen of their pools, when nothing is wrong with any of them."""
    weights = "\n".join(f"[pools.{name}]\nweight = {weight}" for name, weight in WEIGHTS.items())
    config = f'[budget]\nminimum = {BUDGET}\nmaximum = {BUDGET}\nreserve = "0%"\n{weights}\n'
    with ExitStack() as stack:
        disk = stack.enter_context(leftovers.directory("/var/tmp"))
        base = stack.enter_context(leftovers.directory("/dev/shm"))
        tmemd = stack.enter_context(fakes.tmemd(base, config=config))
        parameters: list[str] = []
        for name in WEIGHTS:
            parameters += device(name, tmemd.directory, DEVICE, disk / name, 2 * DEVICE, tmemd=tmemd.socket)
        server = Server(disk, parameters, ("--threads", "8"))
        stack.callback(server.kill)
        server.start()
        sampler = Sampler({name: tmemd.directory / f"{name}.pool" for name in WEIGHTS})
        with sampler.running(), ThreadPoolExecutor() as threads:
            guests = {name: threads.submit(guest, server, name, disk / f"{name}.guest") for name in WEIGHTS}
        ended = {name: future.result() for name, future in guests.items()}
    for name, (said, status) in ended.items():
        print(f"--- {name}, status {status}\n{said}")
    for name in WEIGHTS:
        idle = is_idle((sample.at, sample.requests[name]) for sample in sampler.samples)
        assert guest_faults(*ended[name], idle=idle) == []
    return sampler.samples


def test_ram_follows_the_weights_of_three_guests() -> None:
    uml.make("build/hog", "build/ptrace.so")
    start = time.monotonic()
    window = second_chance(lambda: contended(swap_in_three_guests()))
    seconds = window[-1].at - window[0].at
    print(f"{time.monotonic() - start:.0f} s in all; {seconds:.1f} s of contention, {len(window)} samples")
    use = mean_use(window)
    off = off_weights(use, WEIGHTS)
    for name in WEIGHTS:
        print(f"{name}: {use[name] / MIB:.2f} MiB used on average, {off[name]:+.1%} off its weight")
        fair = use[name] / (1 + off[name])
        assert abs(use[name] - fair) <= max(NEAR * fair, SPAN)
    assert sum(use.values()) > 0.85 * BUDGET
