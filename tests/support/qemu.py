# SPDX-License-Identifier: BSD-3-Clause
"""Guests of QEMU: their kernels, a small first file system for them, and QEMU's monitor."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import DEADLINE, ROOT, wait_until
from tests.support.leftovers import can_have_all_die

KERNELS = sorted(path for path in Path("/boot").glob("vmlinuz-*-amd64") if "cloud" not in path.name)
MODULES = ("virtio/virtio", "virtio/virtio_ring", "virtio/virtio_pci", "virtio/virtio_pci_legacy_dev",
           "virtio/virtio_pci_modern_dev", "block/virtio_blk")  # fmt: skip

needs_qemu = [
    pytest.mark.skipif(not can_have_all_die(), reason="no process namespace to be had, for QEMU to die with"),
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64"),
    pytest.mark.skipif(not KERNELS, reason="no kernel in /boot"),
]


def make_initrd(base: Path, init: str = "libvirt/init", *programs: Path) -> Path:
    """Make one with nothing in it but busybox, drivers, *programs*, and what is *init* below tests/vm."""
    root = base / "root"
    for name in ("bin", "dev", "modules", "proc", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    shutil.copy(ROOT / "tests" / "vm" / init, root / "init")
    for program in programs:
        shutil.copy(program, root / "bin")
    drivers = Path("/lib/modules", KERNELS[-1].name.removeprefix("vmlinuz-"), "kernel", "drivers")
    for name in MODULES:
        shutil.copy(drivers / f"{name}.ko", root / "modules")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--create", "--quiet", "--format=newc"],
        cwd=root,
        input=names.encode(),
        capture_output=True,
        check=True,
    )
    (base / "initrd").write_bytes(archive.stdout)
    return base / "initrd"


def pages_done(console: Path, since: int = 0) -> int:
    """How many pages a guest with that first file system has written and read back. AssertionError when one failed.

    What it said before *since*, in characters, is as if it was not.
    """
    text = console.read_text(errors="replace")[since:] if console.exists() else ""
    assert "failed" not in text, text
    return max(map(int, re.findall(r"guest: (\d+) pages done", text)), default=0)


def goes_on(pages_so_far: Callable[[], int]) -> None:
    """Return when the guest has done what it began now."""
    goal = pages_so_far() + 40
    wait_until(lambda: pages_so_far() >= goal, "the guest to go on")


class Monitor:
    """QEMU's monitor (QMP) at a unix socket, which may be there only soon."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE)
        wait_until(lambda: not self._socket.connect_ex(str(path)), "QEMU")
        self._lines = self._socket.makefile("rw")
        assert "QMP" in self._next()
        self.run("qmp_capabilities")

    def close(self) -> None:
        """Leave."""
        self._lines.close()
        self._socket.close()

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU ended"
        return dict(json.loads(line))

    def run(self, command: str, **arguments: object) -> Any:
        """Have it do something; returns the answer."""
        print(json.dumps({"execute": command, "arguments": arguments}), file=self._lines, flush=True)
        while "event" in (answer := self._next()):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def await_event(self, name: str, **data: object) -> None:
        """Return when it tells of an event with these data, after the last command's answer."""
        end = time.monotonic() + DEADLINE
        while True:
            assert time.monotonic() < end, f"waited in vain for {name}"
            event = self._next()
            if event.get("event") == name and data.items() <= event.get("data", {}).items():
                return
