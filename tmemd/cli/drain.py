# SPDX-License-Identifier: BSD-3-Clause
"""Drain a pool: move all its pages to the backing file, so that the file alone holds the device.

With a plugin that serves the pool, or without one. Puts are refused meanwhile, and accepted again afterwards: freeze
the pool first to keep it empty. What is said afterwards is what was found in tmem then. Ctrl-C ends the waiting, not
the plugin's work. Exit status 75: the NBD server that has the file is away, and it can be drained when that is back.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Final

from tmemd.cli import common, owner, work
from tmemd.client import Client
from tmemd.device import offline
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import AwayError, PoolError

_INTERVAL: Final = 1.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("--wait", action="store_true", help="if its NBD server is away wait for that, without end")
    common.add_pool(parser)


def run(arguments: argparse.Namespace) -> int:
    """Drain it and wait."""
    client = common.client(arguments)
    before = client.pool(arguments.name)
    status = _wait_and_drain(client, before) if arguments.wait else drain(client, before)
    left = status.counters.pages_in_tmem
    if left and status.frozen:
        raise PoolError(f"pool {status.name} was not drained: {left} pages are in tmem still")
    if arguments.json:
        common.print_json(status.flat())
    elif left:
        print(f"{status.name}: drained, but not frozen: its guest has put {left} pages in tmem again")
    else:
        print(f"{status.name}: drained of {before.counters.pages_in_tmem} pages, none is in tmem")
    return 0


def _wait_and_drain(client: Client, before: PoolStatus) -> PoolStatus:
    said = False
    while True:
        try:
            return drain(client, before)
        except AwayError as error:
            if not said:
                common.warn(f"{error}; waiting for it")
            said = True
        time.sleep(_INTERVAL)


def drain(client: Client, before: PoolStatus) -> PoolStatus:
    """Drain a pool, and wait; returns what it is then. Raises AwayError, PoolError."""
    asked = before.served or before.kind == "ephemeral"  # which is refused, in the words of who is asked
    return _drain_served(client, before) if asked else _drain_idle(client, before)


def _drain_served(client: Client, before: PoolStatus) -> PoolStatus:
    total = before.counters.pages_in_tmem
    return work.do(client, before.name, "drain", done=lambda now: total - now.counters.pages_in_tmem, total=total)


def _drain_idle(client: Client, before: PoolStatus) -> PoolStatus:
    if before.error:
        raise PoolError(before.error)
    if not before.has_file:
        raise PoolError(f"pool {before.name} has no backing file to drain to")
    if owner.is_us(before):
        _drain_here(Path(before.path))
    else:
        owner.run(before, ["drain", "--", before.name], "drained")
    return client.pool(before.name)


def _drain_here(path: Path) -> None:
    try:
        offline.drain(path)
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or error}") from None
