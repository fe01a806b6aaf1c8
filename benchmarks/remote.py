# SPDX-License-Identifier: BSD-3-Clause
"""What a backing on an NBD server gives of what that server can do: spilled pages, and pages fetched from there.

The same load is put on the server itself, over NBD, and on a device of ours whose RAM takes nothing and whose backing
it is, by the virtio door, which costs least. Rounds in turn, ratios within a round. The server is nbdkit's `memory`: by
itself, where all that is measured is CPU time that both ends share, and 1 ms away, as over a network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.doors import running
from benchmarks.report import Goal, Spread
from tests.support import leftovers
from tests.support.harness import MIB, PLUGIN, Control, device
from tests.support.load import Option, build, load

SIZE: Final = 256 * MIB
FIRST: Final = 256  # block of 4 KiB: none that is written through
DIRECT, OURS = "the server itself", "our device on it"
FILTERS: Final = {"near": (), "1 ms away": ("--filter=delay", "rdelay=1ms", "wdelay=1ms")}
LOADS: Final[dict[str, dict[str, Option]]] = {
    f"{kind} {kib}k, {depth} in flight": {"mix": mix, "block": kib << 10, "depth": depth, "first": FIRST * 4 // kib}
    for kind, mix in (("spill", "0:1"), ("fetch", "1:0"))
    for kib, depth in ((4, 32), (128, 8))
}
BOUND: Final = 0.85

Round: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Requests a second, by distance, load and who is asked."""


@contextlib.contextmanager
def servers(directory: Path, pools: Path, filters: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """The server's socket and that of our device's virtio door."""
    far, near, vhost = directory / "far.sock", directory / "near.sock", directory / "vhost.sock"
    flags = [word for word in filters if word.startswith("--")]
    keys = [word for word in filters if not word.startswith("--")]
    server = ["nbdkit", "-f", "-U", str(far), *flags, "memory", str(SIZE), *keys]
    ours = device("far", pools, SIZE, f"nbd+unix:///?socket={far}", 64 * MIB, bitmap=directory / "map", vhost=vhost)
    with running(server, far), running(["nbdkit", "-f", "-U", str(near), "python", str(PLUGIN), *ours], near, vhost):
        with Control(pools / "far.pool") as control:
            control.frozen(True)
        yield far, vhost


def one_round(seconds: float) -> Round:
    """Everything once."""
    found: Round = {}
    for distance, filters in FILTERS.items():
        with (
            leftovers.directory("/var/tmp") as directory,
            leftovers.directory("/dev/shm") as pools,
            servers(directory, pools, filters) as (far, vhost),
        ):
            found[distance] = {
                name: {
                    DIRECT: load("nbd", far, seconds=seconds, **options).per_second,
                    OURS: load("vhost", vhost, seconds=seconds, **options).per_second,
                }
                for name, options in LOADS.items()
            }
    return found


def goals(rounds: Sequence[Round]) -> list[Goal]:
    """What was promised."""
    return [
        Goal(f"{distance}: {name}", Spread.of([r[distance][name][OURS] / r[distance][name][DIRECT] for r in rounds]),
             BOUND, True)
        for distance in FILTERS
        for name in LOADS
    ]  # fmt: skip


def table_of(rounds: Sequence[Round], found: Sequence[Goal]) -> Table:
    """Rates of both, and the ratios."""
    table = Table("", f"{DIRECT}, 1/s", f"{OURS}, 1/s", "ratio", "promised", "met")
    for goal in found:
        distance, name = goal.what.split(": ")
        rates = [Spread.of([r[distance][name][who] for r in rounds]).median for who in (DIRECT, OURS)]
        kept = "yes" if goal.met else "NO"
        table.add_row(goal.what, *(f"{rate:.0f}" for rate in rates), str(goal.measured), f">= {goal.bound:g}", kept)
    return table


def main() -> int:
    """Measure and print; the exit status is 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/remote.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement (default: %(default)s)")
    args = parser.parse_args()
    build()
    rounds = [one_round(args.seconds) for _ in range(args.rounds)]
    found = goals(rounds)
    if args.json:
        print(json.dumps({"rounds": rounds, "goals": [asdict(goal) for goal in found]}, indent=1))
    else:
        Console().print(table_of(rounds, found))
    return int(not all(goal.met for goal in found))


if __name__ == "__main__":
    sys.exit(main())
