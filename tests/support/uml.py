# SPDX-License-Identifier: BSD-3-Clause
"""Guests of User-Mode Linux: a kernel that runs as a process of the host, without KVM, and is up in a second or two."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import ROOT, wait_until
from tests.support.leftovers import all_dying_with_us, can_have_all_die, dying_with_us
from tests.support.verdict import KILLED, HarnessError

SHIM = ROOT / "build/ptrace.so"
MOST_OUTPUT = 4 << 20  # bytes; it was seen to print without end
HOST_ROOT = ("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro")  # a view of this machine's

needs_uml = [
    pytest.mark.skipif(not can_have_all_die(), reason="no process namespace to be had, for the guest to die with"),
    pytest.mark.skipif(not shutil.which("linux.uml"), reason="no linux.uml (User-Mode Linux)"),
]


def make(*targets: str) -> None:
    """Have make make what guests need."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests want it at the same time
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
def disk(directory: Path, server: Path, export: str, overlay: Path | None = None) -> Iterator[str]:
    """A virtio disk that is an export of an NBD server, while a with block lasts; yields the kernel's argument.

    With an *overlay*, which `make_overlay` made, what the guest writes goes there, and the export is only read.
    """
    socket = directory / "disk.sock"
    nbd = f"nbd,server.type=unix,server.path={server},export={export},reconnect-delay=600,discard=unmap"
    if overlay:
        nodes = [f"{nbd},node-name=base,read-only=on"]
        nodes += [f"qcow2,node-name=disk,backing=base,discard=unmap,file.driver=file,file.filename={overlay}"]
    else:
        nodes = [f"{nbd},node-name=disk"]
    command = [
        "qemu-storage-daemon",
        *(word for node in nodes for word in ("--blockdev", node)),
        "--export",
        f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=on",
    ]
    with subprocess.Popen(dying_with_us(command)) as daemon:
        try:
            wait_until(lambda: socket.exists() or daemon.poll() is not None, "the disk")
            assert daemon.poll() is None, "qemu-storage-daemon did not start"
            yield f"virtio_uml.device={socket}:2"
        finally:
            daemon.kill()


def make_overlay(path: Path, server: Path, export: str) -> None:
    """Make a qcow2 file that holds what differs from an export of an NBD server."""
    base = f"nbd+unix:///{export}?socket={server}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path], check=True)


def swap_on(directory: Path, argument: str, memory: str, *workload: str, seconds: float) -> tuple[str, int]:
    """What a guest says that swaps on the disk of that *argument* while its *workload* lasts, and its exit status.

    HarnessError when the kernel itself is at fault.
    """
    init = f"init={ROOT}/tests/vm/uml-init"
    said = boot(directory, f"mem={memory}", argument, *HOST_ROOT, init, "--", *workload, seconds=seconds)
    if "Kernel panic" in said:
        raise HarnessError("the guest's kernel crashed")
    status = re.search(r"guest: status (\d+)", said)
    return said, int(status[1]) if status else KILLED[-1]


def debian(directory: Path, *arguments: str, script: str, seconds: float) -> str:
    """Boot a guest whose root tests/vm/make-root made, have it do the lines of *script* once up, and power off.

    The *arguments* of its kernel say where that root is. Returns what it said.
    """
    program = directory / "scenario"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    own = "systemd.show_status=0", "pty.legacy_count=0"  # udev would look at each of 512 terminals
    return boot(directory, *arguments, *own, f"scenario=/host{program}", seconds=seconds)


def boot_from(
    server: Path, export: str, directory: Path, *, script: str, memory: str, seconds: float, overlay: bool = True
) -> str:
    """Have `debian` boot from an export of an NBD server, by way of an *overlay* of the guest's own, or write to it.

    It makes *directory*, where the guest has what it needs. HarnessError when it did not power off.
    """
    directory.mkdir()
    own = directory / "overlay.qcow2" if overlay else None
    if own:
        make_overlay(own, server, export)
    with disk(directory, server, export, own) as argument:
        root = (*HOST_ROOT, f"init={ROOT}/tests/vm/uml-switch-root")
        said = debian(directory, f"mem={memory}", argument, *root, script=script, seconds=seconds)
    print(said)
    if "reboot: System halted" not in said:
        raise HarnessError("the guest did not power off")
    return said
