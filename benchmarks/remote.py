# SPDX-License-Identifier: BSD-3-Clause
"""What a backing on an NBD server gives of what that server can do: spilled pages, and pages fetched from there.

The same load is put on a server itself, over NBD, and on a device of ours whose RAM takes nothing and whose backing is
another like it, by the virtio door, which costs least. Rounds in turn, ratios within a round. The server is nbdkit's
`memory`: 1 ms away, as over a network, and by itself. There all that is measured is CPU time, of which whoever is in
between takes his share: so the promise is against nbdkit's own `nbd` in our place, which does nothing else.
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
from tests.support.harness import MIB, PLUGIN, Control, Door, device
from tests.support.load import Option, build, load

SIZE: Final = 256 * MIB
FIRST: Final = 256  # block of 4 KiB: none that is written through
WHO: Final = ("the server", "nbdkit nbd", "ours")
DIRECT, PROXY, OURS = WHO
FILTERS: Final = {"near": (), "1 ms away": ("--filter=delay", "rdelay=1ms", "wdelay=1ms")}
LOADS: Final[dict[str, dict[str, Option]]] = {
    f"{kind} {kib}k, depth {depth}": {"mix": mix, "block": kib << 10, "depth": depth, "first": FIRST * 4 // kib}
    for kind, mix in (("spill", "0:1"), ("fetch", "1:0"))
    for kib, depth in ((4, 32), (128, 8))
}
BOUND: Final = 0.85
PROMISED: Final = {"near": PROXY, "1 ms away": DIRECT}

Round: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Requests a second, by distance, load and who is asked."""


@contextlib.contextmanager
def servers(directory: Path, pools: Path, filters: Sequence[str]) -> Iterator[dict[str, tuple[Door, Path]]]:
    """Who is asked, each by its door and socket. Our device has its server to itself: it knows what it wrote there."""
    bare, far, proxy, near, vhost = (directory / f"{name}.sock" for name in ("bare", "far", "proxy", "near", "vhost"))
    flags = [word for word in filters if word.startswith("--")]
    keys = [word for word in filters if not word.startswith("--")]
    ours = device("far", pools, SIZE, uri_of(far), 64 * MIB, bitmap=directory / "map", vhost=vhost)
    with contextlib.ExitStack() as all_of_them:
        for socket in (bare, far):
            server: list[str | Path] = ["nbdkit", "-f", "-U", socket, *flags, "memory", str(SIZE), *keys]
            all_of_them.enter_context(running(server, socket))
        all_of_them.enter_context(running(["nbdkit", "-f", "-U", proxy, "nbd", f"uri={uri_of(bare)}"], proxy))
        all_of_them.enter_context(running(["nbdkit", "-f", "-U", near, "python", PLUGIN, *ours], near, vhost))
        with Control(pools / "far.pool") as control:
            control.frozen(True)
        yield {DIRECT: ("nbd", bare), PROXY: ("nbd", proxy), OURS: ("vhost", vhost)}


def uri_of(socket: Path) -> str:
    """Of the server that listens there."""
    return f"nbd+unix:///?socket={socket}"


def rate(door: Door, socket: Path, options: dict[str, Option], seconds: float) -> float:
    """Requests a second. Raises RuntimeError when one of them failed."""
    report = load(door, socket, seconds=seconds, **options)
    if report.failed or report.wrong:
        raise RuntimeError(f"{socket.name}: {report.failed} requests failed, {report.wrong} pages were wrong")
    return report.per_second


def one_round(seconds: float) -> Round:
    """Everything once."""
    found: Round = {}
    for distance, filters in FILTERS.items():
        with (
            leftovers.directory("/var/tmp") as directory,
            leftovers.directory("/dev/shm") as pools,
            servers(directory, pools, filters) as asked,
        ):
            found[distance] = {
                name: {who: rate(door, socket, options, seconds) for who, (door, socket) in asked.items()}
                for name, options in LOADS.items()
            }
    return found


def ratio(rounds: Sequence[Round], distance: str, load_: str, peer: str) -> Spread:
    """Our rate to that of a peer."""
    return Spread.of([r[distance][load_][OURS] / r[distance][load_][peer] for r in rounds])


def goals(rounds: Sequence[Round]) -> dict[tuple[str, str], Goal]:
    """What was promised, by distance and load."""
    return {
        (distance, name): Goal(f"{distance}: {name}, to {peer}", ratio(rounds, distance, name, peer), BOUND, True)
        for distance, peer in PROMISED.items()
        for name in LOADS
    }


def table_of(rounds: Sequence[Round], found: dict[tuple[str, str], Goal]) -> Table:
    """Rates, the ratios, and whether the promise is kept."""
    table = Table("", "load", *(f"{who}, 1/s" for who in WHO), *(f"ours to {who}" for who in WHO[:2]), "kept")
    for (distance, name), goal in found.items():
        rates = [f"{Spread.of([r[distance][name][who] for r in rounds]).median:.0f}" for who in WHO]
        ratios = [str(ratio(rounds, distance, name, peer)) for peer in WHO[:2]]
        table.add_row(distance, name, *rates, *ratios, "yes" if goal.met else "NO")
    table.caption = f"promised: {BOUND:g} of " + ", ".join(
        f"{peer} ({distance})" for distance, peer in PROMISED.items()
    )
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
        print(json.dumps({"rounds": rounds, "goals": [asdict(goal) for goal in found.values()]}, indent=1))
    else:
        Console().print(table_of(rounds, found))
    return int(not all(goal.met for goal in found.values()))


if __name__ == "__main__":
    sys.exit(main())
