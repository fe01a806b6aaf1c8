# SPDX-License-Identifier: BSD-3-Clause
"""Give a device another name, with all that bears it: user, files, socket, NBD export, what was set.

It must have no clients; its pages go to its file first.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, devices
from tmemd.cli.drain import drain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    devices.add_device(parser)
    parser.add_argument("to", metavar="NEW", help="its name from now on")


def run(arguments: argparse.Namespace) -> int:
    """Rename it."""
    devices.devices().rename(arguments.name, arguments.to, drain)
    if arguments.json:
        common.print_json({"name": arguments.to, "renamed": arguments.name})
    return 0
