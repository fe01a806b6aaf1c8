# SPDX-License-Identifier: BSD-3-Clause
"""What a guest's settings, and the way to its server, make of swapping.

A guest of User-Mode Linux runs a program that needs more than the guest's memory: it fills its pages, verifies all of
them in order, overwrites a third and verifies the first half again; under each setting in turn. The
guest's kernel runs at native speed, but a page fault costs it about 50 us by itself, so that differences are smaller
than on hardware. In each round there is a guest for each --transport (a unix socket, TCP, TLS over TCP).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from tests.support import leftovers, uml
from tests.support.harness import MIB, Server, device, wait_until
from tests.support.verdict import HarnessError, second_chance

SETTINGS: Final = (
    "page-cluster=3,swappiness=60,zswap=N",
    "page-cluster=0,swappiness=60,zswap=N",
    "page-cluster=3,swappiness=100,zswap=N",
    "page-cluster=3,swappiness=60,zswap=Y",
)
TRANSPORTS: Final = ("unix", "tcp", "tls")
MEMORY: Final = "96M"
HOG: Final = 120  # MiB
SIZE: Final = 512 * MIB
SECONDS: Final = 1200  # a guard against a hang


def make_certificates(folder: Path) -> None:
    """Of an authority of our own, and of a server at localhost, by the names that GnuTLS's users look for."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    request = ("req", "-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl(*request, "ca-key.pem", "-x509", "-days", "1", "-subj", "/CN=benchmark", "-out", "ca-cert.pem")
    openssl(*request, "server-key.pem", "-subj", "/CN=localhost", "-out", "server.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    by = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", "-days", "1", *by, "-out", "server-cert.pem")


def free_port() -> int:
    """One that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(transport: str, run: Path, pools: Path, limit: int) -> Iterator[str]:
    """A device reached that way; yields what QEMU's block layer says of the server."""
    port, listen, client = free_port(), [], f"server.type=unix,server.path={run / 'nbd.sock'}"
    if transport != "unix":
        listen = ["-i", "127.0.0.1", "-p", str(port)]
        client = f"server.type=inet,server.host=127.0.0.1,server.port={port}"
    if transport == "tls":
        make_certificates(run)
        listen += ["--tls=require", f"--tls-certificates={run}"]
        client += ",tls-creds=tls,tls-hostname=localhost"
    server = Server(run, device("web", pools, SIZE, run / "backing", limit), listen=listen)
    try:
        server.start()
        yield client
    finally:
        server.kill()


@contextlib.contextmanager
def disk(run: Path, client: str) -> Iterator[str]:
    """The kernel's argument for a virtio disk that is the export."""
    path = run / "disk.sock"
    credentials = ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={run}"] if "tls" in client else []
    command = [
        "qemu-storage-daemon", *credentials, "--blockdev", f"nbd,{client},export=web,discard=unmap,node-name=disk",
        "--export", f"vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={path},writable=on",
    ]  # fmt: skip
    with subprocess.Popen(leftovers.dying_with_us(command)) as daemon:
        try:
            wait_until(lambda: path.exists() or daemon.poll() is not None, "the disk")
            yield f"virtio_uml.device={path}:2"
        finally:
            daemon.kill()


def measure(transport: str, limit: int, settings: list[str]) -> str:
    """What a guest says that swaps on a device whose pool may have so many bytes, under each of the settings once.

    HarnessError when the guest failed: its kernel does so now and then.
    """
    with contextlib.ExitStack() as undo:
        pools, run = (undo.enter_context(leftovers.directory(place)) for place in ("/dev/shm", "/var/tmp"))
        argument = undo.enter_context(disk(run, undo.enter_context(serving(transport, run, pools, limit))))
        workload = ("benchmarks/guest-settings", "build/hog", str(HOG), "+".join(settings))
        said, status = uml.swap_on(run, argument, MEMORY, *workload, seconds=SECONDS)
    if status:
        raise HarnessError(said)
    return said


def runs_of(said: str, setting: str) -> list[list[float]]:
    """What a guest said of each of its runs under a setting: three times in seconds, pages in, pages out."""
    lines = re.findall(rf"settings: {re.escape(setting)} (.*)", said)
    return [[float(word) for word in line.split()] for line in lines]


def row(label: str, runs: list[list[float]], first: list[list[float]]) -> str:
    """Of a Markdown table: medians, the range of times, and the time of all against the *first* row's, by round."""
    columns = [sorted(column) for column in zip(*runs, strict=True)]
    times = [f"{median(column):.1f} ({column[0]:.1f} to {column[-1]:.1f})" for column in columns[:3]]
    ratio = median(run[2] / other[2] for run, other in zip(runs, first, strict=True))
    pages = [f"{median(column):.0f}" for column in columns[3:]]
    return f"| {' | '.join([label, *times, f'{ratio:.2f}', *pages])} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE,...", help="page-cluster, swappiness, zswap")
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="default: unix")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--limit", type=int, default=512, help="MiB of RAM for the pool (default %(default)s)")
    args = parser.parse_args()
    uml.make("build/hog", "build/ptrace.so")
    settings = args.settings or list(SETTINGS)
    transports = args.transport or ["unix"]
    said = dict.fromkeys(transports, "")
    for number in range(args.rounds):  # of all in turn: what else runs here is the same for each then, or nearly
        for transport in transports:
            print(f"round {number + 1} of {args.rounds}: {transport}", file=sys.stderr)
            said[transport] += second_chance(partial(measure, transport, args.limit * MIB, settings))
    print("| | fill, s | verify, s | all, s | of the first | pages in | pages out |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = runs_of(said[transports[0]], settings[0])
    for transport in transports:
        for setting in settings:
            print(row(f"{transport}, {setting.replace(',', ', ')}", runs_of(said[transport], setting), first))


if __name__ == "__main__":
    try:
        main()
    except HarnessError as error:
        sys.exit(f"the guest failed twice: {error}")
