# SPDX-License-Identifier: BSD-3-Clause
"""Record a block trace of real guests (User-Mode Linux) at the NBD export that is their disk.

boot   Six guests of 256 MiB boot from one image, each with an overlay of its own, and power off: one, one more, two at
       a time, two at a time.
fleet  Six guests of 128 MiB boot from one image, two at a time, and each does two of these: compile Lua, byte-compile
       Python's library, read all files (dpkg --verify), read some files a few times.
build  A guest of 96 MiB unpacks and compiles Lua and byte-compiles Python's library, three times, on a writable disk.
scan   A guest of 96 MiB reads a database of 125 MiB by chance, with skew, while tar reads the whole disk three times.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.support import blocktrace, leftovers, uml
from tests.support.harness import ROOT, wait_until

SECONDS: Final = 1200  # a guard against a hang
LUA: Final = "http://deb.debian.org/debian/pool/main/l/lua5.4/lua5.4_5.4.4.orig.tar.gz"
BOOT_IMAGE, COMPILER_IMAGE = ("build/vm/root.img", "build/vm/compiler.img")

FETCH: Final = """set -e
mkdir /root/build
cd /root/build
cp /host{directory}/lua.tar.gz ."""
COMPILE: Final = "tar xf lua.tar.gz; make -C lua-* linux >make.log"
COMPILE_PYTHON: Final = "python3 -m compileall -qf /usr/lib/python3.11"
READ_ALL: Final = "dpkg --verify >/dev/null || true"
READ_SOME: Final = """find /usr -xdev -type f -size -64k | shuf -n 800 >/run/some
for round in 1 2 3 4; do
    shuf /run/some | xargs cat >/dev/null
done"""
BUILD: Final = f"""{FETCH}
for round in 1 2 3; do
    {COMPILE}
    {COMPILE_PYTHON}
    rm -r lua-*
    echo "round $round"
done"""
SCAN: Final = """set -e
mkfifo /run/there
PYTHONPATH=/host{root} python3 -B -m benchmarks.hot_set /root/database >/run/there &
read there </run/there
for round in 1 2 3; do
    sleep 15
    tar c --one-file-system --exclude=/root/database / | cat >/dev/null
    echo "round $round"
done
sleep 15
kill %1"""


def fetch_lua(directory: Path) -> None:
    """Have Lua's source there."""
    urllib.request.urlretrieve(LUA, directory / "lua.tar.gz")


@contextlib.contextmanager
def logging(directory: Path, image: Path, *options: str) -> Iterator[Path]:
    """Serve an image for the length of a with block, its requests to `log` in *directory*; yields the socket."""
    socket = directory / "nbd.sock"
    log = f"logfile={directory}/log"
    serve = ["nbdkit", "-f", "-U", str(socket), *options, "--filter=log", "file", str(image), log]
    with subprocess.Popen(leftovers.dying_with_us(serve)) as server:
        try:
            wait_until(lambda: socket.exists() or server.poll() is not None, "nbdkit")
            yield socket
        finally:
            server.kill()


def on_one_image(directory: Path, image: str, memory: str, at_once: Iterable[Sequence[str]]) -> None:
    """Have a guest do each of the scripts; those that stand together run at the same time."""
    numbers = itertools.count()

    def guest(script: str, number: int) -> None:
        uml.boot_from(socket, "", directory / f"guest{number}", script=script, memory=memory, seconds=SECONDS)

    with logging(directory, ROOT / image, "-r") as socket, ThreadPoolExecutor() as pool:
        for scripts in at_once:
            list(pool.map(guest, scripts, numbers))


def boot(directory: Path) -> None:
    """See above."""
    up = "systemctl is-system-running --wait"
    on_one_image(directory, BOOT_IMAGE, "256M", ([up], [up], [up, up], [up, up]))


def fleet(directory: Path) -> None:
    """See above."""
    fetch_lua(directory)
    pairs = [
        ((COMPILE, COMPILE_PYTHON), (READ_SOME, COMPILE)),
        ((READ_ALL, COMPILE), (COMPILE_PYTHON, READ_SOME)),
        ((READ_SOME, COMPILE_PYTHON), (COMPILE, READ_ALL)),
    ]
    fetch = FETCH.format(directory=directory)
    on_one_image(
        directory, COMPILER_IMAGE, "128M", [["\n".join((fetch, *both, "echo done")) for both in pair] for pair in pairs]
    )


def on_writable_disk(directory: Path, script: str) -> None:
    """Have a guest of little memory do the *script* on a copy of an image."""
    image = directory / "disk"
    subprocess.run(["cp", "--sparse=always", ROOT / COMPILER_IMAGE, image], check=True)
    with logging(directory, image) as socket:
        own = directory / "guest"
        uml.boot_from(socket, "", own, script=script, memory="96M", seconds=SECONDS, overlay=False)


def build(directory: Path) -> None:
    """See above."""
    fetch_lua(directory)
    on_writable_disk(directory, BUILD.format(directory=directory))


def scan(directory: Path) -> None:
    """See above."""
    on_writable_disk(directory, SCAN.format(root=ROOT))


WORKLOADS: Final[dict[str, Callable[[Path], None]]] = {"boot": boot, "fleet": fleet, "build": build, "scan": scan}


def main() -> int:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("trace", type=Path, help="the file to make")
    args = parser.parse_args()
    uml.make(BOOT_IMAGE, COMPILER_IMAGE, "build/ptrace.so")
    with leftovers.directory("/var/tmp") as directory:
        WORKLOADS[args.workload](directory)
        with (directory / "log").open() as log:
            blocktrace.write(args.trace, blocktrace.logged(log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
