# SPDX-License-Identifier: BSD-3-Clause
"""Make a device what it was when it was saved, from a save file.

The device was started here once, and is stopped: its pool and its backing file may be others than where it was saved.
A file that is damaged or truncated is refused before anything changes, one that comes through a pipe amid it. What is
half restored nobody can serve, and restore begins anew.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path

from tmemd.cli import common, owner, work
from tmemd.cli.save import STANDARD, idle
from tmemd.device import offline
from tmemd.protocol import PoolStatus
from tmemd.store import savefile
from tmemd.store.poolfile import PoolError
from tmemd.store.savefile import Progress, Reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("file", metavar="FILE", help="the save file; '-': standard input")
    parser.add_argument("--force", action="store_true", help="even if the device has changed since, or is another")


def run(arguments: argparse.Namespace) -> int:
    """Restore it."""
    if all(each.name != arguments.name for each in common.client(arguments).pools()):
        raise PoolError(f"there is no pool {arguments.name} to restore to: start its device once, and stop it")
    status = idle(arguments, "restored")
    where = "standard input" if arguments.file == STANDARD else arguments.file
    with _open(arguments.file) as file, work.bar(f"check {where}", savefile.size_of(file.fileno())) as advance:
        if savefile.size_of(file.fileno()) is not None:
            Reader(file, where).run(None, lambda done, _: advance(completed=done))
            file.seek(0)
        advance(description=f"restore {status.name}", completed=0)
        try:
            _restore(status, file, where, arguments, lambda done, _: advance(completed=done))
        except BaseException:
            _warn_if_half(arguments)
            raise
    if arguments.json:
        common.print_json(common.client(arguments).pool(status.name).flat())
    else:
        print(f"{status.name}: restored from {where}")
    return 0


def _warn_if_half(arguments: argparse.Namespace) -> None:
    with suppress(PoolError):
        if common.client(arguments).pool(arguments.name).half_restored:
            common.warn(f"{arguments.name} is half restored, and nobody can serve it until it is restored again")


def _open(file: str) -> FileIO:
    return FileIO(sys.stdin.fileno(), closefd=False) if file == STANDARD else FileIO(file)


def _restore(status: PoolStatus, file: FileIO, where: str, arguments: argparse.Namespace, progress: Progress) -> None:
    if not owner.is_us(status):
        force = ["--force"] if arguments.force else []
        owner.run(status, ["restore", *force, "--", status.name, STANDARD], "restored", stdin=file.fileno())
        return
    try:
        offline.restore(Path(status.path), Reader(file, where), force=arguments.force, progress=progress)
    except OSError as error:
        raise PoolError(f"{status.name} cannot be restored: {error.strerror or error}") from None
