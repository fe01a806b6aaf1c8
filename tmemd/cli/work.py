"""Waiting for work that the serving plugin was asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from tmemd.client import Client, UnreachableError
from tmemd.protocol import PoolStatus, Work
from tmemd.store.poolfile import PoolError
from tmemd.store.requests import ANY_PAGE, Choice

_INTERVAL: Final = 0.1  # seconds
_PATIENCE: Final = 30.0  # seconds that tmemd or the plugin may be away: what was asked for stays asked for


def do(
    client: Client,
    name: str,
    work: Work,
    nbytes: int = 0,
    choice: Choice = ANY_PAGE,
    *,
    done: Callable[[PoolStatus], int] = lambda _: 0,
    total: int | None = None,
) -> PoolStatus:
    """Ask for *work* and wait, with a bar of *done* out of *total* (None: unknown); returns the status afterwards.

    Raises PoolError when it failed, or the plugin went away and none came back; Ctrl-C ends only the waiting.
    """
    number = client.ask(name, work, nbytes, choice)
    served = time.monotonic()
    with bar(f"{work} {name}", total) as advance:
        while True:
            status = _status(client, name, number)
            advance(done(status))
            if status.answer is not None:
                break
            if status.served:
                served = time.monotonic()
            elif time.monotonic() >= served + _PATIENCE:
                raise PoolError(f"the plugin that served {name} went away before it could {work} it: the next one will")
            time.sleep(_INTERVAL)
    if status.answer:
        raise PoolError(f"{work} of {name} failed: {os.strerror(status.answer)}")
    return status


def _status(client: Client, name: str, number: int) -> PoolStatus:
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return client.pool(name, request=number)
        except UnreachableError:
            if time.monotonic() >= give_up:
                raise
        time.sleep(_INTERVAL)


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal; yields what to call with how much is done."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda completed: progress.update(task, completed=completed)
