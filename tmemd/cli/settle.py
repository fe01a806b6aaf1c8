"""Settle a pool: compact its memory and give back what is free."""

from __future__ import annotations

import argparse

from tmemd.cli import common, work
from tmemd.sizes import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)


def run(arguments: argparse.Namespace) -> int:
    """Settle it and wait."""
    client = common.client(arguments)
    used = client.pool(arguments.name).counters.used_bytes
    status = work.do(client, arguments.name, "settle")
    if arguments.json:
        common.print_json(status.flat())
    else:
        freed = max(0, used - status.counters.used_bytes)
        print(f"{arguments.name}: {format_size(freed)} given back, {format_size(status.counters.used_bytes)} in use")
    return 0
