# SPDX-License-Identifier: BSD-3-Clause
"""Waiting for work that the serving plugin was asked for."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tmemd.cli import common
from tmemd.client import Client, UnreachableError
from tmemd.protocol import PoolStatus, Work
from tmemd.sizes import format_size
from tmemd.store.poolfile import AWAY, AwayError, PoolError
from tmemd.store.requests import ANY_PAGE, Choice

_FAILURES: Final = {
    (
        "handover",
        errno.ENODATA,
    ): "pages were lost with the host, or are damaged, which nobody but this pool could keep in"
    " mind: they must be written or trimmed first, as swapon --discard does",
    ("handover", errno.EOPNOTSUPP): "with overflow= pages may be on this host alone",
}
_NEED_THE_FILE: Final = {"drain", "handover"}
_RESTART_MS: Final = 3000  # a server that is started again is back by then
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

    Raises PoolError when it failed, or the plugin went away and none came back, and AwayError where it needs the file
    and that one's server is away; Ctrl-C ends only the waiting.
    """
    _check_server(client.pool(name), work)
    number = client.ask(name, work, nbytes, choice)
    served = time.monotonic()
    with bar(f"{work} {name}", total) as advance:
        while True:
            status = _status(client, name, number)
            advance(completed=done(status))
            if status.answer is not None or not number:
                break
            _check_server(status, work)
            if status.served:
                served = time.monotonic()
            elif time.monotonic() >= served + _PATIENCE:
                raise PoolError(f"the plugin that served {name} went away before it could {work} it: the next one will")
            time.sleep(_INTERVAL)
    if status.answer in AWAY:
        raise AwayError(f"{work} of {name} failed: {AWAY[status.answer]}")
    if status.answer:
        raise PoolError(f"{work} of {name} failed: {_FAILURES.get((work, status.answer), os.strerror(status.answer))}")
    return status


def free(arguments: argparse.Namespace, work: Work, nbytes: int | None = 0, choice: Choice = ANY_PAGE) -> int:
    """Have *work* done that gives memory back, *nbytes* of it where that can be said (None: all), and print how much.

    Returns the exit status. Raises as `do`.
    """
    client = common.client(arguments)
    used = client.pool(arguments.name).counters.used_bytes
    wanted = used if nbytes is None else nbytes
    status = do(
        client, arguments.name, work, wanted, choice,
        done=lambda now: used - now.counters.used_bytes, total=wanted or None,
    )  # fmt: skip
    now = status.counters.used_bytes
    if arguments.json:
        common.print_json(status.flat())
    else:
        print(f"{arguments.name}: {format_size(max(0, used - now))} given back, {format_size(now)} in use")
    return 0


def _check_server(status: PoolStatus, work: Work) -> None:
    """Do not wait until the plugin has waited for its server."""
    if work in _NEED_THE_FILE and status.is_away and status.remote and status.remote.away_ms >= _RESTART_MS:
        raise AwayError(
            f"{work} of {status.name} needs {common.printable(status.backing)}, whose server has been away for"
            f" {status.remote.away_ms // 1000} s: again when it is back"
        )


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
def bar(label: str = "", total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal.

    Yields what to call as it goes on: with *completed*, and *description* and *total* where these are others now.
    """
    if not sys.stderr.isatty():
        yield lambda **_: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield partial(progress.update, progress.add_task(label, total=total))
