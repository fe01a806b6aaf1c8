# SPDX-License-Identifier: BSD-3-Clause
"""Print what happens to pools, as it happens: an object of JSON on each line, until Ctrl-C.

Kinds of events: 'appeared', 'gone' (a pool); 'served', 'unserved' (a plugin came; it ended, or was killed); 'clients'
(their connections are others now); 'target' (it has moved); 'refused' (so many pages, told every ten seconds at most);
'problem', 'mended' (of tmemd itself); 'missed' (there were others, which tmemd has forgotten). tmemd looks twice a
second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from tmemd.cli import common
from tmemd.client import Client, UnreachableError
from tmemd.events import Seen, Watcher
from tmemd.protocol import MAX_WAIT, Event

_LOOK: Final = 0.5  # seconds between two looks of our own
_AWAY: Final = 1.0  # seconds between two tries while tmemd is away
_OF_POOLS: Final = frozenset({"appeared", "gone", "served", "unserved", "clients", "target", "refused"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="of this pool only, which need not be there yet")
    add("--target-change", type=_percent, default=10.0, metavar="PERCENT",
        help="tell of a target when it has moved by so much since it was told (%(default)g; at least 5)")  # fmt: skip
    add("--count", type=common.count("events"), metavar="N", help="end after so many")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them as they come."""
    client = common.client(arguments)
    batches = _looked_for(client) if arguments.pools else _told(client)
    told, left = _Targets(arguments.target_change / 100), arguments.count
    for batch in batches:
        for event in batch:
            if _is_wanted(event, arguments.names) and told.moved(event):
                common.print_json_line(event)
                left = None if left is None else left - 1
                if left == 0:
                    return 0
    return 0


def _percent(text: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        percent = 0.0
    if not 5 <= percent <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not 5 or more percent")
    return percent


def _is_wanted(event: dict[str, Any], names: Sequence[str]) -> bool:
    return not names or event.get("pool") in names or event["event"] not in _OF_POOLS


class _Targets:
    """The targets that were told last."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: dict[str, int] = {}

    def moved(self, event: dict[str, Any]) -> bool:
        """Whether an event is to be told; of a target with what was told of before."""
        if event["event"] != "target":
            return True
        pool, target = event["pool"], event["target_bytes"]
        before = event["before_bytes"] = self._last.setdefault(pool, event["before_bytes"])
        if abs(target - before) < before * self._share:
            return False
        self._last[pool] = target
        return True


def _told(client: Client) -> Iterator[list[dict[str, Any]]]:
    """By tmemd. Raises UnreachableError when there is none at first; later it may be away."""
    number = client.events().number
    while True:
        try:
            happened = client.events(number, MAX_WAIT)
        except UnreachableError as error:
            common.warn(f"{error}; trying again")
            number = _back(client, number)
            continue
        missed = [{"event": "missed", "time": time.time()}] if happened.missed else []
        yield [*missed, *map(_object, happened.events)]
        number = happened.number


def _back(client: Client, number: int) -> int:
    """Wait for tmemd to come back; returns what to go on with."""
    while True:
        time.sleep(_AWAY)
        try:
            client.events()
        except UnreachableError:
            continue
        return number


def _looked_for(client: Client) -> Iterator[list[dict[str, Any]]]:
    """Without a tmemd: what we see ourselves."""
    watcher = Watcher()
    while True:
        pools = {status.name: Seen.of(status) for status in client.pools()}
        found = watcher.look(pools, [], time.monotonic())
        yield [_object(msgspec.structs.replace(event, time=round(time.time(), 3))) for event in found]
        time.sleep(_LOOK)


def _object(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(event)
    return found
