# SPDX-License-Identifier: BSD-3-Clause
"""Show what the host can spare, and what tmemd makes of it."""

from __future__ import annotations

import argparse

from tmemd.cli import common
from tmemd.protocol import HostStatus
from tmemd.sizes import format_size

add_arguments = common.add_socket


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    status = common.client(arguments).host()
    common.warn_of_problems(status.problems)
    if arguments.json:
        common.print_json(status.flat())
        return 0
    for what, value in _lines(status):
        print(f"{what:<12}{common.printable(value)}")
    if status.available_bytes < status.reserve_bytes:
        common.warn("the host has less available than its reserve")
    return 0


def _lines(status: HostStatus) -> list[tuple[str, str]]:
    def size(nbytes: int | None) -> str:
        return "unbounded" if nbytes is None else f"{nbytes} ({format_size(nbytes)})"

    return [
        ("policy", status.policy),
        ("total", size(status.total_bytes)),
        ("available", size(status.available_bytes)),
        ("reserve", size(status.reserve_bytes)),
        ("budget", size(status.budget_bytes)),
        ("targets", size(status.targets_bytes)),
        ("used", size(status.used_bytes)),
        ("pressure", f"some {_share(status.pressure_some)}, full {_share(status.pressure_full)}"),
        ("writes left", size(status.writes_left_bytes)),
    ]


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
