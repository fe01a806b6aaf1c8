# SPDX-License-Identifier: BSD-3-Clause
"""A guest hibernates onto our device amid swapping, and wakes up after a reboot of the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import uml
from tests.support.harness import MIB, ROOT, Control, Serve, counters, device
from tests.support.leftovers import all_dying_with_us
from tests.support.qemu import KERNELS, make_initrd, needs_qemu
from tmemd.store.requests import Request

SIZE, LIMIT = 512 * MIB, 64 * MIB
MEMORY, HOG = 256, 230  # MiB: a guest of less RAM has none for its own image when it wakes up
SECONDS = 300  # a guard against a hang

pytestmark = [pytest.mark.vm, pytest.mark.timeout(700), *needs_qemu]


def boot(socket: Path, initrd: Path, *arguments: str) -> str:
    """What a guest says until it is off. AssertionError when something failed in it."""
    command: list[str | Path] = [
        "timeout", "--signal=KILL", str(SECONDS),
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-user-config", "-m", str(MEMORY),
        "-kernel", KERNELS[-1], "-initrd", initrd, "-serial", "stdio",
        "-append", " ".join(("console=ttyS0", "quiet", "nowatchdog", f"mib={HOG}", *arguments)),
        "-drive", f"file=nbd+unix:///web?socket={socket},if=virtio,format=raw,discard=unmap",
    ]  # fmt: skip
    done = subprocess.run(all_dying_with_us(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    said = done.stdout.decode(errors="replace")
    print(said)
    assert "failed" not in said
    return said


def test_a_guest_hibernates(serve: Serve, pools: Path, disks: Path, tmp_path: Path) -> None:
    uml.make("build/hog")
    initrd = make_initrd(tmp_path, "hibernation/init", ROOT / "build" / "hog")
    server, pool = serve(device("web", pools, SIZE, disks / "backing", LIMIT)), pools / "web.pool"
    assert "guest: hibernates" in boot(server.socket, initrd)
    assert counters(pool).pages_in_tmem > 0
    with Control(pool) as control:
        control.frozen(True)
        assert control.request(Request.DRAIN) == 0
    server.kill()
    pool.unlink()  # as a reboot does
    server.start()
    said = boot(server.socket, initrd, "wake=yes")
    assert "guest: awake" in said
    assert ", 0 pages wrong" in said
    assert "guest: swapoff succeeded" in said
    assert (counters(pool).bad_checksums, counters(pool).io_errors) == (0, 0)
