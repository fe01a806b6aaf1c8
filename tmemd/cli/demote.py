"""Demote a pool's coldest pages: move them to the backing file until so much memory is free."""

from __future__ import annotations

import argparse

from tmemd.cli import common, work
from tmemd.sizes import size_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("size", type=size_argument, metavar="SIZE", help="how much memory to free: bytes, or 512M, 8G")


def run(arguments: argparse.Namespace) -> int:
    """Demote and wait."""
    client = common.client(arguments)
    used = client.pool(arguments.name).counters.used_bytes
    status = work.do(
        client, arguments.name, "demote", arguments.size,
        done=lambda now: used - now.counters.used_bytes, total=arguments.size,
    )  # fmt: skip
    common.print_given_back(arguments, used, status)
    return 0
