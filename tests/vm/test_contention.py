"""Three real guests at once want more RAM than there is: it follows their weights, and every page comes back right."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.contention import Sample, Sampler
from tests.harness import MIB, ROOT, Server, device, environment
from tests.unit import fakes

WEIGHTS = {"light": 100, "middle": 200, "heavy": 400}
BUDGET = 21 * MIB
DEVICE = 512 * MIB
MEMORY, HOG = "256M", 200  # of a guest; MiB that its workload takes
GUEST_SECONDS = 400
COMMANDS = ("vng", "virtme-run", "qemu-system-x86_64", "nbdkit")

pytestmark = [pytest.mark.vm, pytest.mark.timeout(660)]


def require_guests() -> None:
    missing = [command for command in COMMANDS if not shutil.which(command, path=environment()["PATH"])]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    if not any("cloud" not in kernel.name for kernel in Path("/boot").glob("vmlinuz-*")):
        pytest.skip("no kernel in /boot")


def share(name: str) -> float:
    return BUDGET * WEIGHTS[name] / sum(WEIGHTS.values())


@contextmanager
def guest(server: Server, name: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that swaps on its device as long as its workload lasts."""
    uri = f"nbd+unix:///{name}?socket={server.socket}"
    command = [
        "scripts/boot-guest", "--memory", MEMORY, "--cpus", "1", "--attach", "virtio", uri,
        "tests/vm/workload", "build/hog", str(HOG),
    ]  # fmt: skip
    limited = ["timeout", "--kill-after=10", str(GUEST_SECONDS), *command]
    env = environment() | {"SETTLE_SECONDS": "2"}
    with log.open("wb") as output:
        process = subprocess.Popen(limited, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.terminate()  # timeout passes it on to the whole group
        process.wait()


def contended(samples: list[Sample]) -> list[Sample]:
    """From when all have had their share for the first time until the first of them ends, which frees its pages."""
    begin = next((i for i, each in enumerate(samples) if all(each.used[n] > 0.9 * share(n) for n in WEIGHTS)), None)
    assert begin is not None, "they never all had their shares"
    rest = samples[begin:]
    end = next((i for i, each in enumerate(rest) if any(each.used[n] < 0.5 * share(n) for n in WEIGHTS)), len(rest))
    return rest[:end]


def test_ram_follows_the_weights_of_three_guests() -> None:
    require_guests()
    weights = "\n".join(f"[pools.{name}]\nweight = {weight}" for name, weight in WEIGHTS.items())
    config = f'[budget]\nminimum = {BUDGET}\nmaximum = {BUDGET}\nreserve = "0%"\n{weights}\n'
    start = time.monotonic()
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        tmemd = stack.enter_context(fakes.tmemd(base, config=config))
        parameters: list[str] = []
        for name in WEIGHTS:
            parameters += device(name, tmemd.directory, DEVICE, disk / name, 2 * DEVICE, tmemd=tmemd.socket)
        server = Server(disk, parameters, ("--threads", "8"))
        stack.callback(server.kill)
        server.start()
        sampler = Sampler({name: tmemd.directory / f"{name}.pool" for name in WEIGHTS})
        with sampler.running():
            logs = {name: disk / f"{name}.log" for name in WEIGHTS}
            guests = {name: stack.enter_context(guest(server, name, logs[name])) for name in WEIGHTS}
            status = {name: process.wait() for name, process in guests.items()}
        said = {name: log.read_text(errors="replace") for name, log in logs.items()}
    for name, text in said.items():
        print(f"--- {name}, status {status[name]}\n{text}")
    if 124 in status.values():
        raise RuntimeError(f"the harness broke: a guest did not finish in {GUEST_SECONDS} s")
    for text in said.values():
        assert re.search(r"came back from swap, 0 pages wrong", text)
        assert "guest: swapoff succeeded" in text
        assert "guest: dmesg is clean" in text
    assert set(status.values()) == {0}
    window = contended(sampler.samples)
    seconds = window[-1].at - window[0].at
    print(f"{time.monotonic() - start:.0f} s in all; {seconds:.1f} s of contention, {len(window)} samples")
    mean = {name: sum(sample.used[name] for sample in window) / len(window) for name in WEIGHTS}
    for name in WEIGHTS:
        print(f"{name}: {mean[name] / MIB:.2f} MiB used on average, its share is {share(name) / MIB:.2f}")
    for name in WEIGHTS:
        assert abs(mean[name] - share(name)) <= 0.05 * share(name), name
