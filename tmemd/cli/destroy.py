# SPDX-License-Identifier: BSD-3-Clause
"""Destroy a pool that no plugin serves; what its tmem holds is lost, but for an ephemeral pool's copies."""

from __future__ import annotations

import argparse

from tmemd.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("--yes", action="store_true", help="even if pages are in tmem, which are lost then")


def run(arguments: argparse.Namespace) -> int:
    """Destroy it."""
    common.client(arguments).destroy(arguments.name, lose_pages=arguments.yes)
    if arguments.json:
        common.print_json({"destroyed": arguments.name})
    return 0
