"""Set a pool's target: how much RAM it may take now."""

from __future__ import annotations

import argparse

from tmemd.cli import common
from tmemd.sizes import size_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("--target", type=size_argument, required=True, metavar="SIZE", help="bytes, or 512M, 8G")


def run(arguments: argparse.Namespace) -> int:
    """Set it."""
    common.client(arguments).set_target(arguments.name, arguments.target)
    common.print_changed(arguments)
    return 0
