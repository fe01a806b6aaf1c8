# SPDX-License-Identifier: BSD-3-Clause
"""List the pages that a device has in RAM, for another host to fetch ahead when its guest has moved there.

The list goes to standard output, the pages that were used last first; a device that is served with warm=FILE, and has
nothing in RAM, fetches them from its backing file or source, as far as there is room. It holds numbers of pages only.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import msgspec

from tmemd.cli import common
from tmemd.store import hotlist, poolindex
from tmemd.store.pool import open_pool_file
from tmemd.store.poolfile import PoolError, read_identity

add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    path = Path(common.client(arguments).pool(arguments.name).path)
    fd = open_pool_file(path, writable=False)
    try:
        identity = read_identity(fd, path)
        if identity is None:
            raise PoolError(f"pool {arguments.name} is unfinished")
        poolindex.check_layout(identity, path)
        common.print_json_line(msgspec.to_builtins(hotlist.of_pool(fd, path, identity)))
    finally:
        os.close(fd)
    return 0
