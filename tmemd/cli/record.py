# SPDX-License-Identifier: BSD-3-Clause
"""Record what all pools ask for over time, for simulate; Ctrl-C ends it."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from tmemd.cli import common
from tmemd.client import Client, UnreachableError
from tmemd.simulation.recording import Record, Writer, new_header, pool_record

Wait: TypeAlias = Callable[[float], bool]  # for so many seconds, or until a signal comes: whether one did


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    add, seconds = parser.add_argument, common.seconds(0.01, 86400)
    add("file", type=Path, metavar="FILE", help="a new file; compressed if its name ends in .gz or .xz")
    add("--interval", type=seconds, default=0.5, metavar="SECONDS", help="between two samples (default: %(default)s)")
    add("--duration", type=seconds, metavar="SECONDS", help="when to stop (default: at Ctrl-C)")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record until it is over."""
    client = common.client(arguments)
    alone = arguments.pools is not None
    policy = "" if alone else client.host().policy
    client.pools()
    samples, seconds = 0, 0.0
    header = new_header(arguments.interval, policy)
    with _held_back() as stopped, Writer(arguments.file, header) as writer, _line() as show:
        for at in _times(arguments.interval, arguments.duration, stopped):
            record = _record(client, at, alone=alone)
            if record:
                writer.add(record)
                samples, seconds = samples + 1, at
            missed = "" if record else "; tmemd is away"
            show(f"{arguments.file}: {samples} samples, {at:.0f} s, Ctrl-C ends{missed}")
    if arguments.json:
        common.print_json({"file": str(arguments.file), "samples": samples, "seconds": round(seconds, 3)})
    else:
        print(f"{arguments.file}: {samples} samples in {seconds:.1f} s")
    return 0


@contextlib.contextmanager
def _held_back() -> Iterator[Wait]:
    """Hold SIGINT and SIGTERM back, so that neither ends us in the middle of a line; yields what waits for them.

    A handler that sets an event for which this thread waits can find it holding the event's lock, and wait for ever.
    """
    ours = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield lambda seconds: signal.sigtimedwait(ours, seconds) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _times(interval: float, duration: float | None, stopped: Wait) -> Iterator[float]:
    """Seconds since now, when it is time for a sample; those that are missed are left out."""
    start = time.monotonic()
    at = due = 0.0
    while duration is None or due <= duration:
        yield at
        due = (math.floor(at / interval) + 1) * interval
        if stopped(max(0.0, start + due - time.monotonic())):
            return
        at = time.monotonic() - start


def _record(client: Client, at: float, *, alone: bool) -> Record | None:
    """A sample of all pools; None while tmemd is away."""
    try:
        pools = [status for status in client.pools(long=True) if not status.error and not status.unfinished]
        budget = sum(status.target_bytes for status in pools) if alone else client.host().budget_bytes
    except UnreachableError:
        return None
    return Record(at=round(at, 3), budget_bytes=budget, pools=tuple(map(pool_record, pools)))


@contextlib.contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """Yields what shows a line on standard error that changes, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("recording") as status:
        yield status.update
