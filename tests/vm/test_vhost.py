# SPDX-License-Identifier: BSD-3-Clause
"""Real guests have their disk through the virtio door: of User-Mode Linux and of QEMU."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbd
import pytest

from tests.support import uml
from tests.support.content import PAGE
from tests.support.contention import Sampler
from tests.support.harness import MIB, ROOT, Serve, Server, counters, device, doors, wait_until
from tests.support.kills import kill_until, requests
from tests.support.leftovers import all_dying_with_us
from tests.support.qemu import KERNELS, Monitor, goes_on, needs_qemu, pages_done
from tests.support.verdict import guest_faults, is_idle, second_chance
from tests.vm.judge import swap_faults

LIMIT = 48 * MIB  # far below what the workload swaps, a third of it once compressed
WORKLOAD = ("tests/vm/workload", "build/hog", "320")
SECONDS = 500  # a guard against a hang
KILLS = 20  # at least

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


def in_uml(server: Server, _pool: Path, directory: Path) -> tuple[str, int]:
    """What a guest of User-Mode Linux says that swaps as long as the workload lasts, and its exit status."""
    return uml.swap_on(directory, f"virtio_uml.device={server.vhost}:2", "128M", *WORKLOAD, seconds=SECONDS)


def in_qemu_through_kills(server: Server, pool: Path, _directory: Path) -> tuple[str, int]:
    """The same of a guest of QEMU, while its server is killed and started again."""
    boot = "scripts/boot-guest", "--memory", "256M", "--cpus", "1", "--attach", "vhost", str(server.vhost)
    command = "timeout", "--kill-after=10", str(SECONDS), *boot

    def run() -> tuple[str, int]:
        done = subprocess.run(
            all_dying_with_us([*command, *WORKLOAD]),
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        return done.stdout.decode(errors="replace"), done.returncode

    with ThreadPoolExecutor() as threads:
        guest = threads.submit(run)
        kills = kill_until(guest.done, server, pool, range(400, 1000))
        print(f"{kills} kills")
        assert kills >= KILLS
        return guest.result()


def judge(run: Callable[[], tuple[str, int]], pool: Path) -> None:
    """Let a guest swap, and look at what it says and what its pool shows. HarnessError when there is no telling."""
    before = counters(pool)
    sampler = Sampler({"swap": pool}, interval=0.2)
    with sampler.running():
        said, status = run()
    print(said)
    idle = is_idle((sample.at, sample.requests["swap"]) for sample in sampler.samples)
    assert guest_faults(said, status, idle=idle) + swap_faults(said) == []
    now = counters(pool)
    assert now.trims > before.trims
    assert (now.bad_checksums, now.io_errors) == (0, 0)
    most = max(sample.used["swap"] for sample in sampler.samples)
    print(f"at its peak the pool took {most} of {LIMIT} bytes, at the end {now.used_bytes}")
    assert now.used_bytes < most / 2  # what was freed was trimmed


@pytest.mark.parametrize(
    "guest",
    [pytest.param(in_uml, marks=uml.needs_uml), pytest.param(in_qemu_through_kills, marks=needs_qemu)],
    ids=["UML", "QEMU"],
)
def test_a_guest_swaps(
    serve: Serve, pools: Path, disks: Path, guest: Callable[[Server, Path, Path], tuple[str, int]]
) -> None:
    uml.make("build/hog", "build/ptrace.so")
    server, pool = serve(device("swap", pools, "1G", disks / "backing", LIMIT), door="vhost"), pools / "swap.pool"
    second_chance(lambda: judge(lambda: guest(server, pool, disks), pool))


@contextlib.contextmanager
def small_guest(base: Path, initrd: Path, server: Server) -> Iterator[Monitor]:
    """A guest of QEMU that writes to a disk and reads back, and says so in `console`, for the length of a with block.

    The server is started only when QEMU waits for it.
    """
    command: list[str | Path] = [
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-user-config", "-m", "256M",
        "-object", "memory-backend-memfd,id=shared,size=256M,share=on", "-machine", "pc,memory-backend=shared",
        "-kernel", KERNELS[-1], "-initrd", initrd, "-append", "console=ttyS0 quiet nowatchdog serial=web",
        "-serial", f"file:{base}/console", "-qmp", f"unix:{base}/monitor,server=on,wait=off",
        "-chardev", f"socket,id=web,path={server.vhost},reconnect=1",
        "-device", "vhost-user-blk-pci,id=disk,chardev=web",
    ]  # fmt: skip
    with subprocess.Popen(all_dying_with_us(command)) as process, contextlib.ExitStack() as undo:
        undo.callback(process.kill)
        wait_until((base / "monitor").exists, "QEMU")
        server.start()
        monitor = Monitor(base / "monitor")
        undo.callback(monitor.close)
        yield monitor


def is_connected(monitor: Monitor) -> bool:
    """Whether a guest's QEMU has a connection to the server of its disk."""
    (disk,) = (each for each in monitor.run("query-chardev") if each["label"] == "web")
    return not disk["filename"].startswith("disconnected:")


@pytest.mark.parametrize("size", [pytest.param("64M", marks=needs_qemu)])
def test_a_guest_stops_goes_on_reboots_and_loses_its_disk(
    serve: Serve, pools: Path, disks: Path, initrd: Path, size: str
) -> None:
    server, pool = serve(device("web", pools, size, disks / "backing", size), door="vhost"), pools / "web.pool"
    server.kill()
    console = disks / "console"
    with small_guest(disks, initrd, server) as monitor:
        goes_on(lambda: pages_done(console))

        monitor.run("stop")
        before = requests(pool)
        server.kill()
        wait_until(lambda: not is_connected(monitor), "QEMU to notice")
        server.start()
        wait_until(lambda: is_connected(monitor), "QEMU to come back")
        assert requests(pool) == before
        monitor.run("cont")
        goes_on(lambda: pages_done(console))

        before_reset = len(console.read_text(errors="replace"))
        monitor.run("system_reset")
        goes_on(lambda: pages_done(console, before_reset))

        with pytest.raises(nbd.Error):
            server.connect(door="nbd")
        assert pages_done(console)
        monitor.run("device_del", id="disk")
        monitor.await_event("DEVICE_DELETED", device="disk")
        monitor.run("chardev-remove", id="web")
        wait_until(lambda: doors(pool).vhost == 0, "QEMU to leave")
        with server.client(door="nbd") as client:
            assert any(client.pread(PAGE, page * PAGE).strip(b"\0") for page in range(4096))
