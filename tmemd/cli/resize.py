# SPDX-License-Identifier: BSD-3-Clause
"""Give a device another size; smaller ones only where it holds nothing beyond them.

Its pages go to its file while its guest goes on. Then its server is killed, and the next one serves the new size, while
a guest with a reconnect-delay waits. The guest has its old size until its disk is attached anew or its hypervisor is
told to look (virsh blockresize, QEMU's block_resize); swap on it is then made anew (swapoff, mkswap, swapon).
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, devices
from tmemd.cli.drain import drain
from tmemd.sizes import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    devices.add_device(parser)
    parser.add_argument("size", type=devices.size_text, metavar="SIZE", help="how large it is to be, as 16G")


def run(arguments: argparse.Namespace) -> int:
    """Resize it."""
    devices.devices().resize(arguments.name, arguments.size, drain)
    if arguments.json:
        common.print_json({"name": arguments.name, "size": parse_size(arguments.size)})
    return 0
