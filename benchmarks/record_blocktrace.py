"""Record a block trace of real guests (User-Mode Linux) at the NBD export that is their disk.

boot   Six guests of 256 MiB boot from one image, each with an overlay of its own, and power off: one, one more, two at
       a time, two at a time.
build  A guest of 96 MiB unpacks and compiles Lua and byte-compiles Python's library, three times, on a writable disk.
scan   A guest of 96 MiB reads a database of 125 MiB by chance, with skew, while tar reads the whole disk three times.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.support import blocktrace, leftovers, uml
from tests.support.harness import ROOT, wait_until

SECONDS: Final = 1200  # a guard against a hang
LUA: Final = "http://deb.debian.org/debian/pool/main/l/lua5.4/lua5.4_5.4.4.orig.tar.gz"
BOOT_IMAGE, COMPILER_IMAGE = ("build/vm/root.img", "build/vm/compiler.img")

WAIT_UNTIL_UP: Final = "systemctl is-system-running --wait"
BUILD: Final = """set -e
mkdir /root/build
cd /root/build
cp /host{directory}/lua.tar.gz .
for round in 1 2 3; do
    tar xf lua.tar.gz
    make -C lua-* linux >make.log
    python3 -m compileall -qf /usr/lib/python3.11
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


@contextlib.contextmanager
def logging(directory: Path, image: Path, *options: str) -> Iterator[Path]:
    """Serve an image for the length of a with block, its requests to `log` in *directory*; yields the socket."""
    socket = directory / "nbd.sock"
    serve = [
        "nbdkit",
        "-f",
        "-U",
        str(socket),
        *options,
        "--filter=log",
        "file",
        str(image),
        f"logfile={directory}/log",
    ]
    with subprocess.Popen(leftovers.dying_with_us(serve)) as server:
        try:
            wait_until(lambda: socket.exists() or server.poll() is not None, "nbdkit")
            yield socket
        finally:
            server.kill()


def boot(directory: Path) -> None:
    """See above."""

    def one(number: int) -> None:
        own = directory / f"guest{number}"
        uml.boot_from(socket, "", own, script=WAIT_UNTIL_UP, memory="256M", seconds=SECONDS)

    with logging(directory, ROOT / BOOT_IMAGE, "-r") as socket, ThreadPoolExecutor() as pool:
        for at_once in ([0], [1], [2, 3], [4, 5]):
            list(pool.map(one, at_once))


def on_writable_disk(directory: Path, script: str) -> None:
    """Have a guest of little memory do the *script* on a copy of an image."""
    image = directory / "disk"
    subprocess.run(["cp", "--sparse=always", ROOT / COMPILER_IMAGE, image], check=True)
    with logging(directory, image) as socket:
        own = directory / "guest"
        uml.boot_from(socket, "", own, script=script, memory="96M", seconds=SECONDS, overlay=False)


def build(directory: Path) -> None:
    """See above."""
    urllib.request.urlretrieve(LUA, directory / "lua.tar.gz")
    on_writable_disk(directory, BUILD.format(directory=directory))


def scan(directory: Path) -> None:
    """See above."""
    on_writable_disk(directory, SCAN.format(root=ROOT))


WORKLOADS: Final[dict[str, Callable[[Path], None]]] = {"boot": boot, "build": build, "scan": scan}


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
