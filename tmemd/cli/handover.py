# SPDX-License-Identifier: BSD-3-Clause
"""Have a device that is served write everything to its backing file, from now on, so that another host can serve it.

What is in RAM alone is copied there first, and stays in RAM. When this has ended a FLUSH, such as QEMU sends at the end
of a migration, means that the file has everything. It stays so for who serves the device next here, until --cancel;
with flush=durable it is so always.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common, work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("--cancel", action="store_true", help="write to RAM first again: the guest stays here")


def run(arguments: argparse.Namespace) -> int:
    """Hand it over, or stay."""
    client = common.client(arguments)
    work.do(client, arguments.name, "handback" if arguments.cancel else "handover")
    common.print_changed(arguments)
    if not arguments.json:
        state = "is written back again" if arguments.cancel else "writes through: another host can serve its file"
        print(f"{arguments.name} {state}")
    return 0
