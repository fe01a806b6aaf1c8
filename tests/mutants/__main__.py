# SPDX-License-Identifier: BSD-3-Clause
"""Break the code by rule, one small fault at a time, and see whether the quick tests notice.

Each mutant is made, built and tested in a copy of the tree (as it is now, changes that are not committed included) with
an environment of its own, below build/mutants. Before, the copy itself must pass, and must fail when it is broken
badly. Results are kept there as well: a run that was interrupted goes on, and the next looks only at what it does not
know: a mutant that was caught is looked at again when its file has changed, one that survived when a test has. The
exit status is 1 if fewer than 95 % were caught of those that survivors.toml does not explain, or if that list is out of
date.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.mutants import ledger
from tests.mutants.judge import Judge
from tests.mutants.ledger import Ledger, Result, Score
from tests.mutants.mutant import Mutant
from tests.mutants.sample import choose, mutants_of
from tests.mutants.tree import TreeError
from tmemd.system import locks

ROOT: Final = Path(__file__).resolve().parents[2]
PLACE: Final = ROOT / "build" / "mutants"
SURVIVORS: Final = Path(__file__).with_name("survivors.toml")
GOAL: Final = 0.95


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock for the length of a with block. Raises TreeError when another run has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not locks.try_lock(file.fileno()):
            raise TreeError(f"another run uses {path.parent}")
        yield


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task("mutants", total=total)
        yield progress


def _report(mutant: Mutant, result: Result, explained: dict[str, str]) -> str:
    what = f" by {result.by}" if result.by else f"\n    {_change(mutant)}"
    why = f"\n    explained: {explained[mutant.id]}" if mutant.id in explained else ""
    return (
        f"{result.verdict:9} {result.seconds:6.1f} s  {mutant.id}{what if result.verdict != ledger.SAME else ''}{why}"
    )


def _stale(everything: list[Mutant], explained: dict[str, str], results: list[tuple[Mutant, Result]]) -> list[str]:
    """What is wrong with the list of survivors."""
    known = {mutant.id for mutant in everything}
    gone = [f"no rule makes it any more: {each}" for each in explained if each not in known]
    caught = [
        f"caught by {result.by}: {mutant.id}"
        for mutant, result in results
        if result.is_caught and mutant.id in explained
    ]
    return gone + caught


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150, metavar="N", help="how many (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which of all that the rules make (%(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only those whose id begins so, without testing the tree first",
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="so many at once (%(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="say which, and test nothing")
    parser.add_argument("--again", action="store_true", help="forget what is known of them")
    return parser.parse_args()


def main() -> int:
    """Choose, judge, sum up."""
    args = parse_args()
    console = Console(highlight=False, soft_wrap=True)
    everything = mutants_of(ROOT)
    explained = ledger.explanations(SURVIVORS)
    if args.only:
        chosen = [mutant for mutant in everything if mutant.id.startswith(tuple(args.only))]
    else:
        chosen = choose(everything, args.count, args.seed)
    if args.list:
        for mutant in chosen:
            console.print(f"{mutant.id}\n    {_change(mutant)}", markup=False)
        return 0
    # Whoever is started in the background ignores SIGINT; and after SIGTERM no test may go on without us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    results: list[tuple[Mutant, Result]] = []
    try:
        with _alone(PLACE / "lock"), _progress(console, len(chosen)) as progress:
            known = Ledger(PLACE / "results.jsonl", forget={mutant.id for mutant in chosen} if args.again else ())
            for mutant, result in Judge(ROOT, PLACE, console, known, verify=not args.only).run(chosen, args.jobs):
                results.append((mutant, result))
                console.print(_report(mutant, result, explained), markup=False)
                progress.advance(progress.task_ids[0])
    except TreeError as error:
        console.print(f"mutants: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted after {len(results)} of {len(chosen)}; the next run goes on from there")
        return 130
    return _sum_up(console, Score(results, explained), _stale(everything, explained, results))


def _sum_up(console: Console, score: Score, stale: list[str]) -> int:
    console.print(score.table())
    for mutant in score.survivors:
        console.print(_survivor(mutant), markup=False)
    for problem in stale:
        console.print(f"{SURVIVORS.name}: {problem}", markup=False)
    console.print(f"{score.share:.1%} caught of {len(score.counted)} (at least {GOAL:.0%})")
    return int(score.share < GOAL or bool(stale))


def _survivor(mutant: Mutant) -> str:
    return f"survived: {mutant.id}\n    {_change(mutant)}"


def _change(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.fault.line}: {mutant.describe((ROOT / mutant.file).read_bytes())}"


if __name__ == "__main__":
    sys.exit(main())
