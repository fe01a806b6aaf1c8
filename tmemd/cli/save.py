# SPDX-License-Identifier: BSD-3-Clause
"""Save the pages of a device that nobody serves to a file, from which restore brings them back, here or elsewhere.

Saved is what is not in its newest version in the backing file, which goes along then; with --whole it is every page.
The file is there when it is whole and on the disk, and not before. Stop the device first (tmemctl stop): its guest
waits until it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from tmemd.cli import common, owner, work
from tmemd.device import offline
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size
from tmemd.store import savefile
from tmemd.store.poolfile import PoolError
from tmemd.system.replacing import replacing

STANDARD: Final = "-"  # input or output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    parser.add_argument("file", metavar="FILE", help="the save file, replaced if it is there; '-': standard output")
    parser.add_argument("--whole", action="store_true", help="every page, so that the backing file is not needed")


def run(arguments: argparse.Namespace) -> int:
    """Save it."""
    status = idle(arguments, "saved")
    if arguments.file == STANDARD:
        if sys.stdout.isatty():
            raise PoolError("a save file is nothing for a terminal: name a FILE, or send it to a pipe")
        _save(status, sys.stdout.fileno(), arguments)
        return 0
    try:
        with replacing(Path(arguments.file)) as fd:
            _save(status, fd, arguments)
            header, counts = savefile.describe(fd, arguments.file)
            size = os.fstat(fd).st_size
    except BlockingIOError:
        raise PoolError(f"{arguments.file}: another process is saving to it") from None
    except OSError as error:
        raise PoolError(f"{arguments.file}: {error.strerror}") from None
    if arguments.json:
        common.print_json({"name": status.name, "file": arguments.file, "bytes": size, "whole": header.whole,
                           "pages": counts.pages, "lost": counts.lost})  # fmt: skip
    else:
        print(f"{status.name}: {counts.pages} pages saved in {arguments.file}, {format_size(size)}")
    return 0


def idle(arguments: argparse.Namespace, done: str) -> PoolStatus:
    """The pool that was named, if that can be *done* to it. Raises PoolError."""
    status = common.client(arguments).pool(arguments.name)
    if status.served:
        raise PoolError(
            f"pool {status.name} is served, and can be {done} only while it is not: stop its device ('tmemctl stop"
            f" {status.name}'), whose guest waits until it is started again"
        )
    return status


def _save(status: PoolStatus, fd: int, arguments: argparse.Namespace) -> None:
    with work.bar(f"save {status.name}") as advance:
        if owner.is_us(status):
            _save_here(status, fd, arguments, lambda done, total: advance(completed=done, total=total))
        else:
            whole = ["--whole"] if arguments.whole else []
            owner.run(status, ["save", *whole, "--", status.name, STANDARD], "saved", stdout=fd)


def _save_here(status: PoolStatus, fd: int, arguments: argparse.Namespace, progress: savefile.Progress) -> None:
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            _, damaged, first = offline.save(Path(status.path), file, whole=arguments.whole, progress=progress)
    except OSError as error:
        raise PoolError(f"{status.name} cannot be saved in {arguments.file}: {error.strerror or error}") from None
    if damaged:
        common.warn(
            f"{status.name}: {damaged} pages are damaged, the first of them page {first}: their reads are errors, and"
            " will be ('tmemctl check' tells more)"
        )
