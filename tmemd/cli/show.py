# SPDX-License-Identifier: BSD-3-Clause
"""Show all that is known of one pool.

Sizes are in bytes. 'pinned_target_bytes' is the target that was set by hand, 'target_bytes' the one that holds;
'minimum_bytes' was set, 'least_bytes' is the least that the device works with. What is counted, is counted since the
pool was made. Warnings are explained on standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tmemd.cli import common
from tmemd.cli.activity import Latency, long_form
from tmemd.cli.screen import format_seconds
from tmemd.protocol import OLD_NAMES
from tmemd.sizes import format_size
from tmemd.store.poolfile import Histogram

_NOT_SHOWN: Final = {"latencies", "ages", *OLD_NAMES}  # what follows from them stands beside


add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    status = common.client(arguments).pool(arguments.name, long=True)
    known = long_form(status)
    if arguments.json:
        common.print_json(known)
    else:
        for field, value in known.items():
            if field not in _NOT_SHOWN:
                print(f"{field:<20}", _plain(field, value))
    common.warn_of(status)
    return 0


def _plain(field: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field in _OWN_WORDS:
        return _OWN_WORDS[field](value)
    if field.endswith("_bytes"):
        return f"{value} ({format_size(value)})" if value else "0"
    if field.endswith("_seconds") and isinstance(value, dict):
        return f"median {format_seconds(value['median'])}, 99 % {format_seconds(value['p99'])}"
    return f"{value:.3f}" if isinstance(value, float) else common.printable(str(value))


def _doors(doors: dict[str, Any]) -> str:
    connections = f"{doors['nbd']} by NBD, {doors['vhost']} by virtio"
    if not doors["requests"]:
        return connections
    latency = Latency.of(msgspec.convert(doors["request"], Histogram))
    times = f"median {format_seconds(latency.median)}, 99 % {format_seconds(latency.p99)}"
    return f"{connections} ({doors['requests']} requests, {doors['failures']} failed; {times})"


def _remote(remote: dict[str, Any] | None) -> str:
    if remote is None:
        return "-"
    how = f"{remote['connections']} connections" if remote["connections"] else f"away for {remote['away_ms'] // 1000} s"
    counted = f"{remote['losses']} lost, {remote['repeats']} requests repeated, {remote['time_outs']} timed out"
    return f"{how} ({counted}; {remote['overflow']} pages in its overflow file, {remote['trims']} trimmed there)"


def _lease(seconds: float) -> str:
    return f"ends in {seconds:.1f} s, unless it is renewed" if seconds else "over, so that every request fails"


def _ages(ages: list[dict[str, Any]]) -> str:
    return ", ".join(map(_age, ages)) or "-"


def _age(age: dict[str, Any]) -> str:
    when = "older" if age["seconds"] is None else f"<{age['seconds']:g}s"
    return f"{when} {format_size(age['stored_bytes'])}"


_OWN_WORDS: Final[dict[str, Callable[[Any], str]]] = {
    "stored_by_age": _ages,
    "doors": _doors,
    "lease_seconds": _lease,
    "remote": _remote,
    "connections": lambda found: ", ".join(f"{count} {door}" for door, count in found.items()),
    "miss_seconds": format_seconds,
    "warnings": lambda found: ", ".join(found) or "-",
}
