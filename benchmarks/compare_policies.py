# SPDX-License-Identifier: BSD-3-Clause
"""Replay the recorded workloads through every policy, and print what each costs as a Markdown table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from benchmarks.workloads import RECORDINGS, TUNED, UNTUNED
from tmemd.cli.simulate import POLICIES
from tmemd.policy import by_name
from tmemd.simulation import recording, simulate
from tmemd.simulation.recording import Recording

OURS: Final = "fair"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make policies", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--recordings", type=Path, default=RECORDINGS, metavar="DIR")
    parser.add_argument("--measured", action="store_true", help="also hold the model against what was measured")
    return parser.parse_args()


def costs(known: Recording) -> dict[str, float]:
    """Seconds of the disk's time that each policy costs."""
    times = simulate.times(known)
    return {name: simulate.outcome(simulate.simulate(known, by_name(name)), times).cost_seconds for name in POLICIES}


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def compare(recordings: dict[str, Recording]) -> list[str]:
    """The table of costs; the best of each workload stands out, and all within one percent of it."""
    lines = [row(["workload", *POLICIES, "best other / ours"]), row(["---", *["---:"] * (len(POLICIES) + 1)])]
    for name, known in recordings.items():
        found = costs(known)
        best = min(found.values())
        cells = [f"**{cost:.1f}**" if cost <= best * 1.01 else f"{cost:.1f}" for cost in found.values()]
        other = min(cost for policy, cost in found.items() if policy != OURS)
        lines.append(row([name, *cells, f"{other / found[OURS]:.2f}"]))
    return lines


def check(recordings: dict[str, Recording]) -> list[str]:
    """The table of what was measured, and what the model says of the same policy.

    Both the policy and the device's rules may have changed since; docs/policies.md has the comparison of its time.
    """
    lines = [
        row(["workload", "policy", "measured", "model", "error", "file reads", "model", "pages written", "model"]),
        row(["---", "---", *["---:"] * 7]),
    ]
    for name, known in recordings.items():
        times = simulate.times(known)
        real = simulate.outcome(simulate.recorded(known), times)
        model = simulate.outcome(simulate.simulate(known, by_name(known.header.policy)), times)
        cells = [
            name.partition(".")[0],
            known.header.policy,
            f"{real.cost_seconds:.2f} s",
            f"{model.cost_seconds:.2f} s",
        ]
        cells.append(f"{model.cost_seconds / real.cost_seconds - 1:+.0%}")
        cells += [f"{outcome.total.file_reads:.0f}" for outcome in (real, model)]
        cells += [f"{outcome.total.spills + outcome.total.demotion_writes:.0f}" for outcome in (real, model)]
        lines.append(row(cells))
    return lines


def main() -> int:
    """Read, replay, print."""
    args = parse_args()
    known = {
        path.name.removesuffix(".jsonl.xz"): recording.read(path) for path in sorted(args.recordings.glob("*.jsonl.xz"))
    }
    tuned = {name: known[name] for name in TUNED if name in known}
    untuned = {name: known[name] for name in UNTUNED if name in known}
    print("Seconds of the disk's time:\n", *compare(tuned), sep="\n")
    print("\nRecorded after the policy was settled:\n", *compare(untuned), sep="\n")
    if args.measured:
        print("\nThe model against what was measured:\n", *check(known), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
