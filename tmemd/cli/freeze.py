# SPDX-License-Identifier: BSD-3-Clause
"""Freeze a pool, or all: it refuses all puts, so that new pages go to the file; reads go on."""

from __future__ import annotations

import argparse

from tmemd.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help="the pool's name")
    which.add_argument("--all", action="store_true", help="every pool, those included that come back later")
    common.add_where(parser)


def run(arguments: argparse.Namespace, *, frozen: bool = True) -> int:
    """Freeze it, or thaw it."""
    common.client(arguments).set_frozen(arguments.name, frozen)
    common.print_changed(arguments)
    return 0
