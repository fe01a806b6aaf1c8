# SPDX-License-Identifier: BSD-3-Clause
"""Wait until a pool is as it should be, or takes less RAM than that.

Exit status: 0 when it is, 124 when --timeout came first. A pool that is not there yet, and a tmemd that is away, are
waited for, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Final

from tmemd.cli import common
from tmemd.client import Client, UnreachableError
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size, size_argument
from tmemd.store.poolfile import PoolError, check_name

LATE: Final = 124  # exit status, as that of timeout(1)
_INTERVAL: Final = 0.1  # seconds

_STATES: Final[Mapping[str, Callable[[PoolStatus | None], bool]]] = {
    "served": lambda pool: pool is not None and pool.state == "served",
    "idle": lambda pool: pool is not None and pool.state == "idle",
    "connected": lambda pool: pool is not None and sum(pool.connections.values()) > 0,
    "disconnected": lambda pool: pool is not None and not pool.error and not sum(pool.connections.values()),
    "drained": lambda pool: pool is not None and not pool.error and not pool.counters.pages_in_tmem,
    "frozen": lambda pool: pool is not None and pool.frozen,
    "thawed": lambda pool: pool is not None and not pool.frozen,
    "gone": lambda pool: pool is None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    add = parser.add_argument
    add("name", metavar="NAME", help="the pool's name")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--state", choices=_STATES, help="what to wait for; drained: no page is in tmem; gone: no pool")
    goal.add_argument("--below", type=size_argument, metavar="SIZE", help="until it takes less RAM: bytes, 512M, 8G")
    add("--timeout", type=common.seconds(0, 1e9), metavar="SECONDS", help="give up then (default: never)")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Wait."""
    check_name(arguments.name)
    client = common.client(arguments)
    is_reached = _below(arguments.below) if arguments.state is None else _STATES[arguments.state]
    give_up = None if arguments.timeout is None else time.monotonic() + arguments.timeout
    looks = _Looks(client, arguments.name)
    while not (looks.answered and is_reached(looks.pool)):
        if give_up is not None and time.monotonic() >= give_up:
            return _late(arguments, looks)
        time.sleep(_INTERVAL)
        looks.again()
    if arguments.json:
        common.print_json(looks.pool.flat() if looks.pool else {"name": arguments.name, "state": "gone"})
    return 0


def _below(size: int) -> Callable[[PoolStatus | None], bool]:
    return lambda pool: pool is not None and not pool.error and pool.counters.used_bytes < size


class _Looks:
    """One after the other."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._away = False
        self.again()

    def again(self) -> None:
        """Look: `pool` is what was found, None where there is none; `answered` whether anybody said so."""
        self.pool: PoolStatus | None = None
        try:
            self.pool, self.answered = self._find(), True
        except UnreachableError as error:
            if not self._away:
                common.warn(f"{error}; waiting for it")
            self._away, self.answered = True, False

    def _find(self) -> PoolStatus | None:
        try:
            return self._client.pool(self._name)
        except UnreachableError:
            raise
        except PoolError:
            # There is none, or it is another user's, who is not told from that; damaged ones are only listed.
            return next((pool for pool in self._client.pools() if pool.name == self._name), None)


def _late(arguments: argparse.Namespace, looks: _Looks) -> int:
    wanted = arguments.state or f"below {format_size(arguments.below)}"
    pool = looks.pool
    now = f"{pool.state}, and takes {format_size(pool.counters.used_bytes)}" if pool else "not there"
    if not looks.answered:
        now = "not known, for tmemd is away"
    common.warn(f"{arguments.name} is not {wanted} after {arguments.timeout:g} s: it is {now}")
    return LATE
