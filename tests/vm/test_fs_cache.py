# SPDX-License-Identifier: BSD-3-Clause
"""FS-Cache on our device, as docs/fs-cache.md says: what a guest has read once comes from us, not from its server."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, ROOT, Control, Server, counters, device, environment, taken, wait_until
from tests.support.leftovers import all_dying_with_us, can_have_all_die

KERNELS = sorted(path for path in Path("/boot").glob("vmlinuz-*-amd64") if "cloud" not in path.name)
PAGES = 32 * MIB // PAGE  # of each file
ENOUGH, SMALL = 32 * MIB, 4 * MIB  # of RAM; a file takes 11 MiB

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_have_all_die(), reason="no process namespace to be had, for QEMU to die with"),
    pytest.mark.skipif(not KERNELS, reason="no kernel in /boot"),
    pytest.mark.skipif(not Path("/sbin/cachefilesd").exists(), reason="no cachefilesd"),
]


def documented(start: str) -> str:
    """The block of the document that starts so, without its indentation."""
    text = (ROOT / "docs" / "fs-cache.md").read_text()
    blocks = (textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE))
    (found,) = (block for block in blocks if block.startswith(start))
    return found


class Guest:
    """A guest, by the vng that runs it and a shell of root's in it."""

    def __init__(self, vng: subprocess.Popen[str]) -> None:
        self._vng = vng

    def tell(self, commands: str) -> None:
        """Have it run commands; `answer` waits for them."""
        assert self._vng.stdin
        self._vng.stdin.write(f"( set -e\n{commands}\n) </dev/null 2>&1; echo status $?\n")
        self._vng.stdin.flush()

    def answer(self) -> str:
        """What they printed. AssertionError when one failed, or the guest ended."""
        assert self._vng.stdout
        said = ""
        for line in self._vng.stdout:
            said += line
            if status := re.search(r"status (\d+)$", line.rstrip()):
                assert status[1] == "0", said
                return said
        raise AssertionError(f"the guest ended: {said}")

    def run(self, commands: str) -> str:
        """Have it run commands; returns what they printed. Raises as `answer` does."""
        self.tell(commands)
        return self.answer()


@contextmanager
def guest(socket: Path, export: Path) -> Iterator[Guest]:
    """A guest that has our device and an exported directory, and our configuration, for the length of a with block."""
    options = documented("-blockdev").replace("/run/tmemd-devices/web-files.sock", str(socket)).replace("\n", " ")
    options = options.replace("/srv/data", str(export))
    assert str(socket) in options
    assert str(export) in options
    vng = ["vng", "--run", str(KERNELS[-1]), "--disable-kvm", "--cpus", "1", "--memory", "384M", "--user", "root",
           "--force-9p", "--append", "nowatchdog mitigations=off", f"--qemu-opts={options}", "--", "bash"]  # fmt: skip
    with subprocess.Popen(
        all_dying_with_us(vng),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            web = Guest(process)
            web.run(f"udevadm settle\ncat >>/etc/fstab <<'END'\n{documented('/dev/disk')}END")
            web.run(f"cat >/etc/cachefilesd.conf <<'END'\n{documented('dir ')}END")
            yield web
        finally:
            process.kill()


def write(path: Path, version: int) -> str:
    """Give a file so many pages of that version; returns their checksum. Neither its size nor its times tell of it."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns) if path.exists() else None
    content = b"".join(compressible(page, version) for page in range(PAGES))
    path.write_bytes(content)
    if times:
        os.utime(path, ns=times)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Setting:
    """A guest whose cache is on a device of ours, and what it mounts."""

    server: Server
    pool: Path
    export: Path
    web: Guest


@pytest.fixture(scope="module")
def booted() -> Iterator[Setting]:
    with ExitStack() as stack:
        pools, disks = (stack.enter_context(leftovers.directory(place)) for place in ("/dev/shm", "/var/tmp"))
        pools, export = pools / "base", disks / "export"  # the other is locked
        pools.mkdir()
        export.mkdir()
        server = Server(disks, device("web-files", pools, "256M", disks / "backing", ENOUGH, prefetch="no")).start()
        stack.callback(server.kill)
        yield Setting(server, pools / "web-files.pool", export, stack.enter_context(guest(server.socket, export)))


def begin(web: Guest) -> None:
    """Make an empty cache, and mount what it is for."""
    web.run(documented("mkfs") + documented("echo RUN"))


def end(web: Guest) -> None:
    """Unmount both."""
    web.run("umount /srv\nservice cachefilesd stop\numount /var/cache/fscache")


@pytest.fixture
def setting(booted: Setting) -> Iterator[Setting]:
    """The same with a cache in which there is nothing yet."""
    booted.web.run("dmesg --clear")
    begin(booted.web)
    yield booted
    end(booted.web)


def test_what_was_read_once_comes_from_us(setting: Setting) -> None:
    server, pool, export, web = setting.server, setting.pool, setting.export, setting.web
    old = write(export / "read", 1)
    write(export / "unread", 1)
    with Control(pool) as control:
        forget = documented("umount")
        assert old in web.run(f"sha256sum /srv/read\n{forget}")
        new = write(export / "read", 2)
        write(export / "unread", 2)

        before = counters(pool)
        web.tell("sha256sum /srv/read")
        wait_until(lambda: counters(pool).gets > before.gets + PAGES // 8, "the cache to be read")
        server.kill()
        server.start()
        assert old in web.answer()
        assert counters(pool).gets >= before.gets + PAGES
        assert new in web.run("sha256sum /srv/unread")  # no other cache hides what the server has now

        control.target(SMALL)
        wait_until(lambda: taken(pool) <= SMALL, "the pool to shrink")
        before = counters(pool)
        assert old in web.run(f"{forget}\nsha256sum /srv/read")
        assert counters(pool).file_reads >= before.file_reads + PAGES // 2
        assert "I/O error" not in web.run("dmesg")


def test_what_was_lost_comes_from_the_server(setting: Setting) -> None:
    server, pool, export, web = setting.server, setting.pool, setting.export, setting.web
    checksum = write(export / "read", 1)
    assert checksum in web.run("sha256sum /srv/read\nsync")
    server.kill()
    pool.unlink()  # with the host
    server.start()
    assert checksum in web.run(documented("umount") + "sha256sum /srv/read")
    assert "I/O error" in web.run("dmesg")

    end(web)
    begin(web)
    assert checksum in web.run(f"sha256sum /srv/read\n{documented('umount')}")
    write(export / "read", 2)
    assert checksum in web.run("sha256sum /srv/read")
