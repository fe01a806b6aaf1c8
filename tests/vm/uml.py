"""Guests of User-Mode Linux: a kernel that runs as a process of the host, without KVM, and is up in a second or two."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import ROOT, wait_until
from tests.support.leftovers import all_dying_with_us, can_have_all_die, dying_with_us
from tests.vm.verdict import KILLED, HarnessError

SHIM = ROOT / "build/ptrace.so"
MOST_OUTPUT = 4 << 20  # bytes; it was seen to print without end

needs_uml = [
    pytest.mark.skipif(not can_have_all_die(), reason="no process namespace to be had, for the guest to die with"),
    pytest.mark.skipif(not shutil.which("linux.uml"), reason="no linux.uml (User-Mode Linux)"),
]


def make(*targets: str) -> None:
    """Have make make what guests need."""
    subprocess.run(all_dying_with_us(["make", "--silent", "-C", ROOT, *targets]), check=True)


def boot(directory: Path, *arguments: str, seconds: float) -> str:
    """Boot a guest with these *arguments* of its kernel; returns what it said until it had powered off, or was killed.

    It keeps what it needs in *directory*, and is killed after so many *seconds*.
    """
    kernel = ["linux.uml", f"uml_dir={directory}", "con=null", "con0=null,fd:1", "quiet", *arguments]
    # Its processes are traced ones, which would outlive it.
    command = all_dying_with_us(["timeout", "--signal=KILL", str(seconds), *kernel])
    environment = os.environ | {"LD_PRELOAD": str(SHIM), "TMPDIR": "/dev/shm"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as guest:
        try:
            assert guest.stdout
            return guest.stdout.read(MOST_OUTPUT).decode(errors="replace")
        finally:
            guest.kill()


@contextlib.contextmanager
def disk(directory: Path, server: Path, export: str) -> Iterator[str]:
    """A virtio disk that is an export of an NBD server, while a with block lasts; yields the kernel's argument."""
    socket = directory / "disk.sock"
    command = [
        "qemu-storage-daemon",
        "--blockdev",
        f"nbd,node-name=disk,server.type=unix,server.path={server},export={export},discard=unmap,reconnect-delay=600",
        "--export",
        f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
    ]
    with subprocess.Popen(dying_with_us(command)) as daemon:
        try:
            wait_until(lambda: socket.exists() or daemon.poll() is not None, "the disk")
            yield f"virtio_uml.device={socket}:2"
        finally:
            daemon.kill()


def swap_on(directory: Path, argument: str, memory: str, *workload: str, seconds: float) -> tuple[str, int]:
    """What a guest says that swaps on the disk of that *argument* while its *workload* lasts, and its exit status.

    HarnessError when the kernel itself is at fault.
    """
    root = ["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={ROOT}/tests/vm/uml-init"]
    said = boot(directory, f"mem={memory}", argument, *root, "--", *workload, seconds=seconds)
    if "Kernel panic" in said:
        raise HarnessError("the guest's kernel crashed")
    status = re.search(r"guest: status (\d+)", said)
    return said, int(status[1]) if status else KILLED[-1]
