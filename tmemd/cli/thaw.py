"""Thaw a pool, or all: it accepts puts again."""

from __future__ import annotations

import argparse

from tmemd.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool_or_all(parser)


def run(arguments: argparse.Namespace) -> int:
    """Thaw it."""
    common.client(arguments).set_frozen(arguments.name, False)
    common.print_changed(arguments)
    return 0
