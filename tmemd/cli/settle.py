"""Settle a pool: compact its memory and give back what is free.

Ctrl-C ends the waiting, not the plugin's work.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)


def run(arguments: argparse.Namespace) -> int:
    """Settle it and wait."""
    client = common.client(arguments)
    used = client.pool(arguments.name).counters.used_bytes
    status = work.do(client, arguments.name, "settle")
    common.print_given_back(arguments, used, status)
    return 0
