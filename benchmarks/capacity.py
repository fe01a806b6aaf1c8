# SPDX-License-Identifier: BSD-3-Clause
"""What a cluster of so many guests needs, by calculation from what was measured of one device (docs/cluster.md).

All is said of one host, but for what all hosts together ask of the store. How long a guest waits is no part of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from tmemd.sizes import size_argument

PAGE: Final = 4096
MIB, GIB = 1 << 20, 1 << 30

# Measured: docs/benchmarks.md says how, and on what.
INDEX_SHARE: Final = 1 / 512  # of a device's size
COMPRESSED: Final = 0.36  # of a page's size
SERVER_BYTES: Final = 14 * MIB  # an nbdkit with one device beside its pool; what such processes share is divided
SERVER_IDLE_CPUS: Final = 0.0006
REQUEST_SECONDS: Final = 31e-6  # CPU of the server for a page that is read or written, one at a time
TICK_SECONDS: Final = 0.013 / 256  # CPU of tmemd for each pool
TICKS: Final = 2  # a second
WIRE_BYTES: Final = 4322 + 160 + 5 * 24  # of a page by NBD over TCP, both ways, Ethernet's preambles and gaps included
CONNECTIONS: Final = 4  # of a device to its backing
QEMU_NBD_BYTES: Final = 53 * MIB  # one that serves an RBD image
QEMU_NBD_SECONDS: Final = 105e-6  # its CPU for a page that is read


@dataclass(frozen=True)
class Load:
    """What guests ask for: sizes in bytes, rates in pages a second."""

    size: int  # of a device
    ram: int  # that a guest's pages take on average
    rate: float  # of a guest at its peak
    busy: float  # share of guests at their peak at once
    misses: float  # share of these pages that RAM does not have, or not take


@dataclass(frozen=True)
class Needs:
    """What that takes, of each host unless it is said."""

    hosts: int
    guests: int
    index_gib: float
    pages_gib: float
    pages_hold_gib: float
    servers_gib: float
    qemu_nbd_gib: float
    request_cpus: float
    idle_cpus: float
    tmemd_cpus: float
    qemu_nbd_cpus: float
    network_gbit: float
    connections: int
    store_requests: float


def needs(hosts: int, guests: int, load: Load) -> Needs:
    """Calculate, for so many *hosts* with so many *guests* on each."""
    pages = guests * load.busy * load.rate
    missed = pages * load.misses
    return Needs(
        hosts=hosts,
        guests=guests,
        index_gib=guests * load.size * INDEX_SHARE / GIB,
        pages_gib=guests * load.ram / GIB,
        pages_hold_gib=guests * load.ram / COMPRESSED / GIB,
        servers_gib=guests * SERVER_BYTES / GIB,
        qemu_nbd_gib=guests * QEMU_NBD_BYTES / GIB,
        request_cpus=pages * REQUEST_SECONDS,
        idle_cpus=guests * SERVER_IDLE_CPUS,
        tmemd_cpus=guests * TICK_SECONDS * TICKS,
        qemu_nbd_cpus=missed * QEMU_NBD_SECONDS,
        network_gbit=missed * WIRE_BYTES * 8 / 1e9,
        connections=guests * CONNECTIONS,
        store_requests=hosts * missed,
    )


ROWS: Final = {
    "index_gib": "RAM for indices, GiB",
    "pages_gib": "RAM for pages, GiB",
    "pages_hold_gib": "what these are before compression, GiB",
    "servers_gib": "RAM for nbdkit, GiB",
    "qemu_nbd_gib": "RAM for qemu-nbd, with RBD, GiB",
    "request_cpus": "CPUs for nbdkit, at the peak",
    "qemu_nbd_cpus": "CPUs for qemu-nbd, with RBD, at the peak",
    "idle_cpus": "CPUs for devices that rest",
    "tmemd_cpus": "CPUs for tmemd",
    "network_gbit": "network to the store, at the peak, Gbit/s",
    "connections": "connections to the store",
    "store_requests": "requests of all hosts to the store, at the peak, a second",
}


def number(value: float) -> str:
    """For people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def render(columns: list[Needs]) -> Iterator[str]:
    """A table in Markdown, a column for each."""
    yield "| of a host | " + " | ".join(f"{each.hosts} hosts of {each.guests} guests" for each in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for field, what in ROWS.items():
        yield f"| {what} | " + " | ".join(number(getattr(each, field)) for each in columns) + " |"


def cluster(text: str) -> tuple[int, int]:
    """Hosts and guests of '20x50'."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no cluster: write 20x50 for 20 hosts with 50 guests on each")
    return int(found[1]), int(found[2])


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clusters", type=cluster, nargs="+", metavar="HOSTSxGUESTS", help="such as 20x50")
    parser.add_argument("--size", type=size_argument, default="8G", help="of a device (default: %(default)s)")
    parser.add_argument("--ram", type=size_argument, default="512M", help="of a guest's pages (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2000, help="pages a second of a guest (default: %(default)s)")
    parser.add_argument("--busy", type=share, default=0.1, help="share of guests that ask (default: %(default)s)")
    parser.add_argument("--misses", type=share, default=0.2, help="share not had in RAM (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    load = Load(args.size, args.ram, args.rate, args.busy, args.misses)
    columns = [needs(hosts, guests, load) for hosts, guests in args.clusters]
    print(json.dumps([asdict(each) for each in columns]) if args.json else "\n".join(render(columns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
