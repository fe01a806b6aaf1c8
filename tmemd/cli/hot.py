# SPDX-License-Identifier: BSD-3-Clause
"""List the pages that a device has in RAM, for another host to fetch ahead when its guest has moved there.

The list goes to standard output, the pages that were used last first; a device that is served with warm=FILE, and has
nothing in RAM, fetches them from its backing file or source, as far as there is room. It holds numbers of pages only.
"""

from __future__ import annotations

import argparse

import msgspec

from tmemd.cli import common
from tmemd.store import hotlist

add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    with common.pool_index(arguments) as (fd, path, identity):
        common.print_json_line(msgspec.to_builtins(hotlist.of_pool(fd, path, identity)))
    return 0
