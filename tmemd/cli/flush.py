# SPDX-License-Identifier: BSD-3-Clause
"""Drop all pages of an ephemeral pool: they are read from its source again when somebody needs them.

With a plugin that serves the pool, or without one. Ctrl-C ends the waiting, not the plugin's work.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, work

add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Flush it and wait."""
    return work.free(arguments, "flush", None)
