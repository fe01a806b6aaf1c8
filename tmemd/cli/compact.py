# SPDX-License-Identifier: BSD-3-Clause
"""Compact a pool's memory, and give back what is free.

Ctrl-C ends the waiting, not the plugin's work.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, work

add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Compact it and wait."""
    return work.free(arguments, "compact")
