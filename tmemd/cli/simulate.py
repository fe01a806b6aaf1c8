# SPDX-License-Identifier: BSD-3-Clause
"""Say what a recording would have cost under each policy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import msgspec

from tmemd.cli import common, work
from tmemd.policy import NAMES, by_name
from tmemd.simulation import recording, simulate
from tmemd.simulation.storemodel import Counts
from tmemd.sizes import size_argument
from tmemd.store.poolfile import is_name

POLICIES: Final = (*NAMES[:-1], *(f"smart-alloc:{percent}" for percent in ("0.75", "2", "4", "6")))
AS_RECORDED: Final = "as recorded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="a file that tmemctl record wrote")
    parser.add_argument("--policy", type=_policy, action="append", metavar="NAME",
                        help=f"can be repeated (default: {', '.join(POLICIES)})")  # fmt: skip
    parser.add_argument("--budget", type=size_argument, metavar="SIZE", help="RAM for all pools (default: as recorded)")
    parser.add_argument("--miss", type=_miss, action="append", default=[], metavar="NAME=SECONDS",
                        help="as if a page of that pool took so long to be read; can be repeated")  # fmt: skip


def _policy(text: str) -> str:
    try:
        by_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _miss(text: str) -> tuple[str, float]:
    name, _, seconds = text.rpartition("=")
    if not is_name(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SECONDS, such as web=0.001")
    return name, common.seconds(1e-9, 3600)(seconds)


def run(arguments: argparse.Namespace) -> int:
    """Replay and print."""
    replayed = recording.read(arguments.recording)
    misses = dict(arguments.miss)
    times = msgspec.structs.replace(simulate.times(replayed), said=misses)
    policies = list(dict.fromkeys(arguments.policy or POLICIES))
    outcomes = {AS_RECORDED: simulate.outcome(simulate.recorded(replayed), times)}
    with work.bar("simulate", len(policies)) as advance:
        for number, name in enumerate(policies):
            advance(completed=number)
            pools = simulate.simulate(replayed, by_name(name), arguments.budget, misses)
            outcomes[name] = simulate.outcome(pools, times)
    if not any(outcome.total != Counts() for outcome in outcomes.values()):
        common.warn("nobody swapped while this was recorded: it says nothing about policies")
    if arguments.json:
        common.print_json({
            "recorded_policy": replayed.header.policy,
            "seconds": replayed.seconds,
            "times": msgspec.to_builtins(times),
            "outcomes": msgspec.to_builtins(outcomes),
        })  # fmt: skip
    else:
        _print(replayed, times, outcomes)
    return 0


def _print(replayed: recording.Recording, times: simulate.Times, outcomes: dict[str, simulate.Outcome]) -> None:
    best = min(outcome.cost_seconds for name, outcome in outcomes.items() if name != AS_RECORDED)
    table = common.table("POLICY", "COST", "OF BEST", "FROM RAM", "FILE READS", "SPILLS", "DEMOTION WRITES")
    for name, outcome in outcomes.items():
        label = f"({name}, {replayed.header.policy or 'no tmemd'})" if name == AS_RECORDED else name
        table.add_row(label, *_row(outcome, best))
    common.print_table(table)
    print(
        f"{replayed.seconds:.0f} s; a page read from the file takes {_time(times.read, times.read_measured)},"
        f" one written {_time(times.write, times.write_measured)}"
        + "".join(f"; one of the source of {name} {seconds * 1e6:.0f} us" for name, seconds in times.sources.items())
        + "".join(
            f"; one of the file of {name} {seconds * 1e6:.0f} us, as was said" for name, seconds in times.said.items()
        )
    )


def _time(seconds: float, measured: bool) -> str:
    return f"{seconds * 1e6:.0f} us ({'measured' if measured else 'assumed: too few were recorded'})"


def _row(outcome: simulate.Outcome, best: float) -> list[str]:
    total: Counts = outcome.total
    reads = total.gets + total.file_reads
    return [
        f"{outcome.cost_seconds:.2f} s",
        f"{outcome.cost_seconds / best:.2f}" if best else "-",
        f"{total.gets / reads:.1%}" if reads else "-",
        *(f"{n:.0f}" for n in (total.file_reads, total.spills, total.demotion_writes)),
    ]
