# SPDX-License-Identifier: BSD-3-Clause
"""Demote a pool's coldest pages: move them to the backing file until so much memory is free.

Without SIZE, all pages that --idle and --incompressible choose. Ctrl-C ends the waiting, not the plugin's work.
"""

from __future__ import annotations

import argparse
import math
from typing import Final

from tmemd.cli import common, work
from tmemd.sizes import size_argument
from tmemd.store.poolfile import GENERATION_SECONDS, GENERATIONS
from tmemd.store.requests import Choice

# A page of age n was last used n - 1 to n + 1 generations ago.
_LONGEST: Final = (GENERATIONS - 2) * GENERATION_SECONDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    add = parser.add_argument
    add("size", type=size_argument, nargs="?", metavar="SIZE", help="how much memory to free: bytes, or 512M, 8G")
    add("--idle", type=common.seconds(0, _LONGEST), default=0.0, metavar="SECONDS",
        help=f"only pages that nobody used for so long (up to {_LONGEST:g})")  # fmt: skip
    add("--incompressible", action="store_true", help="only pages that take as much in RAM as in the file")


def run(arguments: argparse.Namespace) -> int:
    """Demote and wait."""
    if arguments.size is None and not arguments.idle and not arguments.incompressible:
        arguments.parser.error("which pages? say SIZE, --idle or --incompressible (or drain, for all)")
    # The youngest age whose pages are all idle for that long.
    min_age = math.ceil(arguments.idle / GENERATION_SECONDS) + 1 if arguments.idle else 0
    return work.free(arguments, "demote", arguments.size, Choice(min_age, arguments.incompressible))
