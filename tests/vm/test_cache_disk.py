# SPDX-License-Identifier: BSD-3-Clause
"""A guest compiles on an ext4 that lies on a cache device, whose server is killed again and again."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import uml
from tests.support.harness import MIB, ROOT, Serve, cache_device, counters
from tests.support.kills import kill_until
from tests.support.verdict import HarnessError, second_chance

CORE = ROOT / "tmemd/core"
SOURCES = "[a-b]*.c"  # of it, to be compiled
SIZE = 96 * MIB
ROUNDS = 4
KILLS = 3  # at least
SECONDS = 240  # a guard against a hang
WELL = "guest: all well"
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run
mount -t proc proc /proc
mount -t tmpfs run /run
mount --bind /usr/lib/uml/modules /lib/modules
modprobe virtio_blk
sh -e {work} && echo "guest: all well"
busybox poweroff -f
"""
WORK = """
mount -t ext4 -o discard,errors=remount-ro /dev/vda /mnt
cd /mnt
{commands}
cd /
umount /mnt
"""
COMPILE = f"""
for round in $(seq {ROUNDS}); do
    mkdir $round
    cp {CORE}/*.[ch] $round/
    (cd $round && gcc -O0 -c {SOURCES})
    sync
    echo 3 >/proc/sys/vm/drop_caches
    sha256sum $round/* >>sums
    rm -rf gone
    cp -r $round gone
done
"""

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200), *uml.needs_uml]


def run_guest(server: Path, directory: Path, commands: str) -> None:
    """Have a guest do something on the disk."""
    directory.mkdir()
    init, work = directory / "init", directory / "work"
    work.write_text(WORK.format(commands=commands))
    init.write_text(INIT.format(work=work))
    init.chmod(0o755)
    with uml.disk(directory, server, "disk") as argument:
        said = uml.boot(directory, "mem=256M", argument, *uml.HOST_ROOT, f"init={init}", seconds=SECONDS)
    print(said)
    if "reboot: System halted" not in said or "Kernel panic" in said:
        raise HarnessError("the guest did not power off")
    assert WELL in said


def compiled(directory: Path) -> dict[str, str]:
    """The checksums of what the guest is to find, by name."""
    directory.mkdir()
    for path in CORE.glob("*.[ch]"):
        shutil.copy(path, directory)
    subprocess.run(
        ["gcc", "-O0", "-c", *sorted(path.name for path in directory.glob(SOURCES))], cwd=directory, check=True
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def make_file_system(path: Path) -> None:
    """A disk with an empty ext4."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)


def assert_sound(path: Path) -> None:
    """e2fsck finds nothing to do."""
    found = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_a_guest_compiles_is_right_through_kills(serve: Serve, pools: Path, disks: Path) -> None:
    uml.make("build/ptrace.so")
    source, pool = disks / "disk", pools / "disk.pool"
    expected = compiled(disks / "expected")
    make_file_system(source)
    server = serve(cache_device("disk", pools, source, 8 * MIB, write="through"))

    def compile_in_guest() -> None:
        server.kill()
        make_file_system(source)
        server.start()
        with ThreadPoolExecutor() as threads:
            guest = threads.submit(run_guest, server.socket, new_directory(disks), COMPILE)
            kills = kill_until(guest.done, server, pool, range(10, 100))
            guest.result()
        print(f"{kills} kills")
        assert kills >= KILLS

    second_chance(compile_in_guest)
    server.kill()
    assert_sound(source)
    server.start()
    sums = "".join(
        f"{checksum}  {directory}/{name}\n"
        for directory in [*range(1, ROUNDS + 1), "gone"]
        for name, checksum in expected.items()
    )
    (disks / "sums").write_text(sums)
    check = f"sha256sum --quiet -c {disks}/sums\nsha256sum --quiet -c sums"
    second_chance(lambda: run_guest(server.socket, new_directory(disks), check))
    now = counters(pool)
    assert (now.bad_checksums, now.io_errors) == (0, 0)
    server.kill()
    assert_sound(source)


def new_directory(disks: Path) -> Path:
    """A name for one."""
    return disks / f"guest{len(list(disks.iterdir()))}"
