# SPDX-License-Identifier: BSD-3-Clause
"""SIGKILL, again and again, of the plugins and the tmemd of devices in use; now and then the host dies with them.

After each kill pages are compared with what was acknowledged, at the end all of them, and what was left behind is
looked for: memory, processes, descriptors, files. Exit status: 0, 1 when something was lost, stale or leaked, 2 for a
wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.soak.soak import KINDS, Findings, SoakError, run
from tests.support import leftovers

SAY_EVERY: Final = 100  # kills, where there is no terminal


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tests.soak", description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=positive(int), default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=positive(float), default=60.0, help="at most (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of devices (default: all)")
    parser.add_argument("--seed", type=int, help="of what is done, though not of when (default: another each time)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy all files there when something is wrong")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_args(arguments)


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Parses numbers above 0."""

    def parse(text: str) -> float:
        number = kind(text)
        if number <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return number

    return parse


@contextmanager
def showing(kills: int) -> Iterator[Callable[[Findings], None]]:
    """A bar on a terminal, a line now and then elsewhere; yields what it is told of each kill."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda now: say(now) if now.kills % SAY_EVERY == 0 else None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("kills", total=kills)
        yield lambda now: bar.update(
            task, completed=now.kills, description=f"kills, {now.pages_verified} pages verified"
        )


def say(now: Findings) -> None:
    """One line."""
    print(f"{now.kills} kills, {now.pages_verified} pages verified, {now.seconds:.0f} s", file=sys.stderr, flush=True)


def render(found: Findings) -> str:
    """The findings as lines for people."""
    memory = ", ".join(f"{name} {share:.2f}" for name, share in found.memory_of_fresh.items())
    return (
        f"{found.kills} kills in {found.seconds:.0f} s ({found.kills / found.seconds:.1f} a second): "
        f"{found.kills_of_plugins} of a plugin, {found.kills_of_tmemd} of tmemd, "
        f"{found.kills_while_attaching} more while attaching, {found.host_deaths} of the host\n"
        f"{found.requests} requests acknowledged, {found.pages_verified} pages verified: none lost, none stale\n"
        f"with the host went {found.pages_lost_with_the_host} pages of write-back devices, which read as errors;\n"
        f"of durable ones {found.pages_older_after_host_death} were older than the newest, none than the last FLUSH\n"
        f"memory, of what fresh pools take: {memory}; no process, descriptor or file is left"
    )


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks."""
    args = parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background ignores it
    leftovers.own_mounts()
    leftovers.sweep()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    try:
        with showing(args.kills) as progress:
            limits = {"kills": args.kills, "seconds": args.minutes * 60}
            found = run(args.kinds, seed=seed, progress=progress, keep=args.keep, **limits)
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 130
    print(json.dumps({"seed": seed} | asdict(found)) if args.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
