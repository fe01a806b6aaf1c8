# SPDX-License-Identifier: BSD-3-Clause
"""A host of its own with a real libvirtd, a tmemd, libvirt's hook and the watch over guests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.harness import ROOT, environment, wait_until
from tests.support.leftovers import all_dying_with_us, dying_with_us
from tests.support.qemu import KERNELS
from tmemd.libvirt.records import Records

_STEP = re.compile(r"^(?:hog: .* s |guest: \d+ pages done)", re.MULTILINE)
_WRONG = re.compile(r"WRONG|Kernel panic|guest: .*failed|Killed process|Out of memory|I/O error|Read-error")
FILES = ROOT / "tests" / "vm" / "libvirt"


def documented(tag: str, about: str, document: str = "guests.md") -> str:
    """The element of that name in the document in which there is *about*."""
    text = (ROOT / "docs" / document).read_text()
    elements = re.findall(rf"^ +<{tag}\b.*?</{tag}>$", text, flags=re.MULTILINE | re.DOTALL)
    (found,) = (each for each in elements if about in each)
    return str(found)


class Host:
    """A host, as `host` makes it. Paths are those that it sees, unless they are below *base*."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._environment = environment()
        self._process = subprocess.Popen(
            all_dying_with_us([FILES / "host", base]),
            env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(base / "said").open("wb"),
        )  # fmt: skip

    @property
    def uri(self) -> str:
        """Where another host reaches its libvirtd."""
        return f"qemu+unix:///system?socket={self.base}/libvirt/libvirt-sock"

    def command(self, *words: str | Path) -> list[str]:
        """What runs this there."""
        process = f"/proc/{self._process.pid}/ns"
        return ["nsenter", f"--mount={process}/mnt", f"--pid={process}/pid_for_children", "--", *map(str, words)]

    def run(self, *words: str | Path, status: int = 0) -> str:
        """Run it, to end with that status; returns all that it said."""
        done = subprocess.run(
            self.command(*words), env=self._environment, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, (words, done.returncode, done.stdout)
        return done.stdout

    def tmemctl(self, *words: str | Path, status: int = 0) -> str:
        """The same of tmemctl."""
        return self.run("tmemctl", *words, status=status)

    def virsh(self, *words: str | Path, status: int = 0) -> str:
        """The same of virsh."""
        return self.run("virsh", *words, status=status)

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start it, to be ended by who called, or with the host."""
        return subprocess.Popen(dying_with_us(self.command(*words)), env=self._environment, cwd=ROOT)

    def close(self) -> None:
        """End it, and all that runs there."""
        self._process.kill()
        self._process.wait()

    def is_up(self) -> bool:
        """Whether libvirtd and tmemd answer."""
        assert self._process.poll() is None, (self.base / "said").read_text()
        with suppress(AssertionError):
            return bool(self.virsh("list") and self.tmemctl("list", "--json"))
        return False

    def restart_libvirtd(self) -> None:
        """SIGKILL it, and have it run again."""
        self.run("sh", "-c", "kill -9 $(pidof libvirtd)")
        self.start("libvirtd")
        wait_until(self.is_up, "libvirtd")

    @contextmanager
    def without_tmemd(self) -> Iterator[None]:
        """No tmemd for the length of a with block, nor for a drain that a hook begins in it."""
        self.run("sh", "-c", "kill -9 $(pidof -x tmemd)")
        yield
        self.run("sh", "-c", "while pgrep -f 'tmemd-libvirt [d]rain' >&2; do :; done")
        self.start("tmemd", "--group=tmemd", "--allow-group=tmemd")
        wait_until(self.is_up, "tmemd")

    def kill(self, device: str) -> None:
        """SIGKILL its server, and return when it is gone."""
        pid = self.pool(device)["pid"]
        self.run("sh", "-c", f"kill -9 {pid}; while kill -0 {pid} 2>&-; do :; done")

    def pool(self, device: str) -> dict[str, Any]:
        """What `tmemctl show` says of its pool."""
        shown: dict[str, Any] = json.loads(self.tmemctl("show", device, "--json"))
        return shown

    def drained(self, device: str) -> None:
        """Return when nothing of it is in RAM only."""
        wait_until(lambda: self.pool(device)["pages_in_tmem"] == 0, f"{device} to be drained")

    def reboot(self, device: str) -> None:
        """What a reboot of the host does to a device: its server and its pool are gone."""
        self.kill(device)
        self.tmemctl("destroy", "--yes", device)


@contextmanager
def host(base: Path) -> Iterator[Host]:
    """A host for the length of a with block, with libvirt's hook and the watch installed."""
    made = Host(base)
    try:
        wait_until(made.is_up, "libvirtd and tmemd")
        shutil.copy(ROOT / "scripts/libvirt/tmemd", base / "etc/libvirt/hooks/qemu.d")
        made.run("sh", "-c", "kill -HUP $(pidof libvirtd)")  # systemctl reload libvirtd
        wait_until(lambda: _is_hooked(made), "libvirtd to know the hook")
        made.start("tmemd-libvirt", "watch")
        yield made
    finally:
        made.close()


class Guest:
    """A domain that writes on its console how its work goes."""

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self.name = name
        self.console = host.base / f"{name}.console"

    def start(self) -> None:
        """As `virsh start`: from where it was saved, if it was."""
        self._host.virsh("start", self.name)

    def steps(self) -> int:
        """How much it has done. AssertionError when something went wrong in it."""
        said = self.console.read_text(errors="replace") if self.console.exists() else ""
        assert not _WRONG.search(said), said[-3000:]
        return len(_STEP.findall(said))

    def goes_on(self, steps: int = 2) -> None:
        """Return when it has done so much more."""
        goal = self.steps() + steps
        wait_until(lambda: self.steps() >= goal, f"{self.name} to go on")

    def says(self, what: str) -> None:
        """Return when it has said that."""
        wait_until(lambda: bool(self.steps()) and what in self.console.read_text(errors="replace"), what)

    def runs(self) -> bool:
        """Whether it has a QEMU."""
        return self.state().startswith(("running", "paused"))

    def state(self) -> str:
        """What `virsh domstate --reason` says: 'running (booted)'."""
        return self._host.virsh("domstate", "--reason", self.name).strip()


@contextmanager
def guest(
    host: Host, name: str, initrd: Path, *elements: str, arguments: str = "", mib: int = 256, machine: str = "pc"
) -> Iterator[Guest]:
    """A domain for the length of a with block, defined with these elements, most of them among its devices."""
    made = Guest(host, name)
    xml = host.base / f"{name}.xml"
    xml.write_text(
        f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
          <name>{name}</name><memory unit='MiB'>{mib}</memory>{_those(elements, "<memoryBacking")}
          <os>
            <type arch='x86_64' machine='{machine}'>hvm</type>
            <kernel>{KERNELS[-1]}</kernel><initrd>{initrd}</initrd>
            <cmdline>console=ttyS0 quiet nowatchdog panic=-1 {arguments}</cmdline>
          </os><features><acpi/></features>
          <devices>
            <serial type='file'><source path='{made.console}' append='on'/></serial>{_those(elements, "<disk")}
          </devices>
          {_those(elements, "<qemu:")}
        </domain>"""
    )
    host.virsh("define", xml)
    try:
        yield made
    finally:
        if made.runs():
            host.virsh("destroy", name)
        host.virsh("undefine", "--managed-save", name)
        made.console.unlink(missing_ok=True)


def _is_hooked(host: Host) -> bool:
    """Whether it is the hook that keeps a guest from starting whose device is not there."""
    with guest(host, "probe", KERNELS[-1], documented("disk", "/web.sock").replace("/web.sock", "/nowhere.sock")):
        said = host.virsh("start", "probe", status=1)
    host.run("rm", "-f", Records().path("nowhere"))  # libvirt 9.0 does not say that it failed to start
    return "no device nowhere is defined" in said


def _those(elements: tuple[str, ...], begin: str) -> str:
    return "\n".join(each for each in elements if each.lstrip().startswith(begin))
