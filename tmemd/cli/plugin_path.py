# SPDX-License-Identifier: BSD-3-Clause
"""Print the path of the plugin, which is what nbdkit's python plugin wants first."""

from __future__ import annotations

import argparse

from tmemd import plugin_path
from tmemd.cli import common
from tmemd.store.poolfile import PoolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command: none."""


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    try:
        path = str(plugin_path())
    except FileNotFoundError as error:
        raise PoolError(str(error)) from None
    if arguments.json:
        common.print_json({"path": path})
    else:
        print(path)
    return 0
