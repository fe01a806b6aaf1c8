"""Freeze a pool, or all: it refuses all puts, so that new pages go to the file; reads go on."""

from __future__ import annotations

import argparse

from tmemd.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool_or_all(parser)


def run(arguments: argparse.Namespace) -> int:
    """Freeze it."""
    common.client(arguments).set_frozen(arguments.name, True)
    common.print_changed(arguments)
    return 0
