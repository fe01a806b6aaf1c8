# SPDX-License-Identifier: BSD-3-Clause
"""What is done in the guest: tmemd is installed from the source tree, and devices are managed under load.

    scenario.py first|second

The first boot installs, and ends with a drained device and settings that are damaged; the second must find every page.
Each says on the console how it ended.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import nbd

from tests.support.content import PAGE, content
from tests.support.documents import commands_of
from tests.support.vhost.disk import Disk

T = TypeVar("T")

ROOT = Path(__file__).parents[3]
DEVICES = ("web", "db")
IMAGE, IMAGE_PAGES = Path("/var/lib/images/golden.img"), 256
DISK = "/dev/ubdb"
VHOST = Path("/run/tmemd-devices/golden/vhost.sock")
SIZE = 16 << 20
KEPT = Path("/root/kept.json")
SETTINGS = Path("/var/lib/tmemd/settings.json")
# What a server can answer (NBD's protocol has no others); all else says that the connection is no more.
ANSWERS = {"EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN"}
DEADLINE = 180.0  # seconds; only a guard against a hang
ENOUGH = 50  # requests that show that a client goes on


class Client(threading.Thread):
    """A guest at work: writes and reads pages, and knows what each must hold.

    It does as QEMU with a reconnect-delay: who loses the connection connects again, and repeats what was not answered.
    """

    def __init__(self, name: str, versions: dict[int, int]) -> None:
        super().__init__(name=name, daemon=True)
        self.versions = versions  # of each page that was written
        self.requests = 0
        self.connections = 0
        self.error: str | None = None
        self._end = threading.Event()
        self._random = random.Random(name)
        self._handle: nbd.NBD | None = None

    def run(self) -> None:
        # There is one CPU, and what is managed meanwhile is not to wait for us.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            while not self._end.is_set():
                self._step()
            for page in self.versions:
                self._read(page)
        except (nbd.Error, AssertionError) as error:
            self.error = f"{self.name}: {error}"

    def finish(self) -> None:
        """End, having read all that was written."""
        self._end.set()
        self.join(DEADLINE)
        self.check()
        assert not self.is_alive(), f"{self.name} did not end"

    def check(self) -> None:
        """AssertionError when a request failed, or a page was not what it must be."""
        assert self.error is None, self.error

    def _step(self) -> None:
        page = self._random.randrange(SIZE // PAGE)
        if page in self.versions and self._random.random() < 0.5:
            self._read(page)
        else:
            version = self.versions.get(page, 0) + 1
            self._repeat(lambda handle: handle.pwrite(content(page, version), page * PAGE))
            self.versions[page] = version

    def _read(self, page: int) -> None:
        found = self._repeat(lambda handle: bytes(handle.pread(PAGE, page * PAGE)))
        assert found == content(page, self.versions[page]), f"page {page} is not its version {self.versions[page]}"

    def _repeat(self, request: Callable[[nbd.NBD], T]) -> T:
        while True:
            try:
                self._handle = self._handle or self._connect()
                answer = request(self._handle)
            except nbd.Error as error:
                if error.errno in ANSWERS:
                    raise
                self._handle = None
                time.sleep(0.05)
            else:
                self.requests += 1
                return answer

    def _connect(self) -> nbd.NBD:
        handle = connect(self.name)
        self.connections += 1
        return handle


@contextmanager
def load(kept: dict[int, int]) -> Iterator[list[Client]]:
    """A client at work on each device for the length of a with block, at the end of which all pages are read.

    *kept*: the versions of the pages that the first device has.
    """
    clients = [Client(name, kept if name == DEVICES[0] else {}) for name in DEVICES]
    for client in clients:
        client.start()
    await_progress(clients)
    yield clients
    for client in clients:
        client.finish()
        say(f"{client.name}: {client.requests} requests over {client.connections} connections, none failed")


def await_progress(clients: list[Client]) -> None:
    """Return when each client has got answers to requests that it began now."""
    goals = [(client, client.requests + ENOUGH) for client in clients]

    def is_there() -> bool:
        for client, _ in goals:
            client.check()
        return all(client.requests >= goal for client, goal in goals)

    wait_until(is_there, "the clients to go on")


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Poll until *ready* is true; AssertionError naming *what* when it never is."""
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def say(what: str) -> None:
    """Tell the host."""
    print(f"scenario: {time.monotonic():5.1f} s: {what}", flush=True)


def run(command: str) -> str:
    """Run a command line, and return what it wrote. AssertionError when it fails."""
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout.strip()


def state(unit: str) -> str:
    """A unit's state, as 'active' or 'inactive'."""
    return run(f"systemctl show --value --property ActiveState {unit}")


def replaced(line: str, old: str, new: str) -> str:
    """The line with what is different here. AssertionError when it is not as it was."""
    assert old in line, f"{line!r}: where is {old!r}?"
    return line.replace(old, new)


def install(wheels: Path) -> None:
    """Do what docs/operating.md says, but for what there is no network, compiler or disk for."""
    host, device, *_ = commands_of("docs/operating.md", "From the source tree")
    packages, venv, pip, *rest = host
    assert packages.startswith("apt-get install"), packages
    pip = replaced(pip, "install .", f"install --quiet --no-index --find-links={wheels} tmemd")
    for command in (venv, pip, *rest):
        run(f"cd {ROOT} && {command}")
        say(command)
    for name in DEVICES:
        for command in device:
            run(command.replace("8G", str(SIZE)).replace("web", name))


def manage(clients: list[Client]) -> None:
    """What an administrator does by habit, while guests swap."""
    for command in (
        "tmemctl restart web",
        "systemctl restart tmemd-device@web tmemd-device@db",
        "systemctl stop tmemd-device@web",  # its waiting client has it started again
        "systemctl kill --signal=KILL tmemd-device@db",
        "systemctl daemon-reload",
        "systemctl reload tmemd",
        "systemctl stop tmemd",
        "systemctl start tmemd",
        "systemctl restart tmemd-pools",
        "systemctl restart tmemd 'tmemd-device@*'",
    ):
        run(command)
        await_progress(clients)
        say(command)
    run("systemctl stop tmemd-device@web.socket")
    assert state("tmemd-device@web") == state("tmemd-device@web.socket") == "inactive"
    await_progress(clients[1:])
    assert state("tmemd-device@web") == "inactive", "who waits for it must not start it"
    run("systemctl start tmemd-device@web")
    await_progress(clients)
    say("its socket stopped, and the device started")
    run("tmemctl stop db")
    await_progress(clients[:1])
    assert state("tmemd-device@db") == state("tmemd-device@db.socket") == "inactive", "its client waits"
    run("tmemctl start db")
    await_progress(clients)
    say("tmemctl stop, start")
    assert not run("systemctl --failed --plain --no-legend")


def make_and_remove() -> None:
    """Devices with their files elsewhere; and nothing is left of one that could not be made, or was removed."""
    Path("/srv/swap").mkdir()
    before = traces()
    run("nbdkit --ipaddr 127.0.0.1 --pidfile /run/other.pid memory 16M")
    for backing in ("/srv/swap", "/srv/file", DISK, "nbd://127.0.0.1/"):
        name = "other"
        run(f"tmemctl create {name} --size 4M --backing {backing} --weight 300")
        connect(name).pwrite(content(7, 1), 7 * PAGE)
        if backing == "/srv/swap":
            run(f"tmemctl resize {name} 8M && tmemctl rename {name} another")
            name = "another"
            assert json.loads(run(f"tmemctl show {name} --json"))["weight"] == 300
            assert "of pages: detach it" in run(f"tmemctl remove {name}; true")
        else:
            run(f"systemctl restart tmemd-device@{name}")
        assert connect(name).pread(PAGE, 7 * PAGE) == content(7, 1)
        run(f"tmemctl remove {name} --force")
        assert traces() == before, f"{traces()}, not {before}"
        say(f"made with --backing {backing}, and removed")
    run("kill -KILL $(cat /run/other.pid)")
    assert "unknown key no=" in run("tmemctl create other --size 8M -o no=thing; true")
    assert "services see nothing of /home" in run("tmemctl create other --size 8M --backing /home/x; true")
    assert traces() == before
    assert not run("systemctl --failed --plain --no-legend")


def traces() -> str:
    """What there is of devices in the system."""
    return run(
        "{ cut -d: -f1 /etc/passwd; find /etc/tmemd /etc/systemd /var/lib/tmemd-devices /run/tmemd-devices /srv"
        " /run/tmemd/pools -mindepth 1; systemctl list-units --all --plain --no-legend 'tmemd-device@*other*';"
        f" stat -c %U {DISK}; }} | sort"
    )


def connect(name: str) -> nbd.NBD:
    """A connection to a device."""
    handle = nbd.NBD()
    handle.set_export_name(name)
    handle.connect_unix(f"/run/tmemd-devices/{name}.sock")
    return handle


def serve_image() -> None:
    """Do what docs/cache-devices.md says of a golden image; two guests read it, and once more after a restart."""
    IMAGE.parent.mkdir(parents=True)
    IMAGE.write_bytes(b"".join(content(page, 1) for page in range(IMAGE_PAGES)))
    *_, service = commands_of("docs/cache-devices.md", "One image, many guests")
    for command in service:
        run(command)
    for _ in range(2):
        for _ in range(2):
            handle = connect("golden")
            assert handle.is_read_only()
            assert all(handle.pread(PAGE, page * PAGE) == content(page, 1) for page in range(IMAGE_PAGES))
        run(f"echo OPTIONS=vhost={VHOST} >>/etc/tmemd/golden.conf")
        run("systemctl restart tmemd-device@golden")
    disk = Disk(VHOST)
    assert all(disk.pread(PAGE, page * PAGE) == content(page, 1) for page in range(IMAGE_PAGES))
    run(f"runuser -u nobody -G kvm -- test -w {VHOST}")
    run(f"! runuser -u tmemd-web -- test -w {VHOST}")
    assert "ephemeral" in run("tmemctl show golden")
    pid = run("systemctl show --value --property MainPID tmemd-device@golden")
    run(f"nsenter --mount --target {pid} sh -c '! test -w {IMAGE} && ! test -w /etc'")
    say("an image is served")


def check_separation() -> None:
    """A device's user gets at nothing of another's, and the services are as confined as their units say."""
    for path in (
        "/run/tmemd/pools/db.pool",
        "/var/lib/tmemd-devices/db/backing",
        "/var/lib/tmemd-devices/db/backing.map",
    ):
        run(f"runuser -u tmemd-db -- test -r {path}")
        run(f"! runuser -u tmemd-web -- test -r {path}")
    for unit in ("tmemd", *(f"tmemd-device@{name}" for name in DEVICES)):
        pid = run(f"systemctl show --value --property MainPID {unit}")
        run(f"grep -q '^Seccomp:.2$' /proc/{pid}/status")
        run(f"nsenter --mount --target {pid} sh -c '! test -w /etc && test -w /run/tmemd/pools'")
    owners = {run(f"stat --format %U /run/tmemd/pools/{name}.pool") for name in DEVICES}
    assert owners == {f"tmemd-{name}" for name in DEVICES}


def drain() -> None:
    """What docs/operating.md says to do before a reboot."""
    run("tmemctl freeze web && tmemctl drain web")
    run("systemctl stop tmemd-device@web.socket")
    run("tmemctl drain web && tmemctl thaw web")


def first(wheels: Path) -> None:
    """The first boot."""
    install(wheels)
    say("installed")
    run("tmemctl host")
    kept: dict[int, int] = {}
    with load(kept) as clients:
        manage(clients)
    check_separation()
    make_and_remove()
    serve_image()
    drain()
    KEPT.write_text(json.dumps(list(kept.items())))
    run("tmemctl set web --weight 200")
    assert SETTINGS.exists()
    SETTINGS.write_bytes(b'{"pools": {"web": {"weight": 2')
    SETTINGS.chmod(0o644)


def second() -> None:
    """The boot after that."""
    wait_until(
        lambda: {state("tmemd"), *(state(f"tmemd-device@{name}") for name in DEVICES)} == {"active"}, "all units"
    )
    run("tmemctl host")
    with load(dict(json.loads(KEPT.read_text()))) as clients:
        run("systemctl restart tmemd 'tmemd-device@*'")
        await_progress(clients)


def main() -> None:
    """Do what the command line says, and say how it ended."""
    boot, wheels = sys.argv[1], Path(sys.argv[2])
    try:
        first(wheels) if boot == "first" else second()
    except BaseException:
        say("FAILED")
        subprocess.run(["journalctl", "--no-pager", "--boot", "--lines=80", "--output=short-monotonic"], check=False)
        raise
    say("all well")


if __name__ == "__main__":
    main()
