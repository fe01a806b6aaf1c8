# SPDX-License-Identifier: BSD-3-Clause
"""Remove a device: its service, definition, user, pool and backing file. A disk or a source stays.

Refused while it has clients, or pages that would be lost.
"""

from __future__ import annotations

import argparse

from tmemd.cli import devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    devices.add_device(parser)
    parser.add_argument("--force", action="store_true", help="even with clients and pages, which are lost then")


def run(arguments: argparse.Namespace) -> int:
    """Remove it."""
    devices.devices().remove(arguments.name, force=arguments.force)
    devices.print_state(arguments, "removed")
    return 0
