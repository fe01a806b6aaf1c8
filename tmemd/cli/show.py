"""Show all that is known of one pool."""

from __future__ import annotations

import argparse

from tmemd.cli import common
from tmemd.sizes import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    known = common.client(arguments).pool(arguments.name).flat()
    if arguments.json:
        common.print_json(known)
        return 0
    for field, value in known.items():
        is_size = field == "size" or field.endswith("_bytes")
        print(f"{field:<16}", f"{value} ({format_size(value)})" if is_size else _plain(value))
    return 0


def _plain(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return common.printable(str(value))
