# SPDX-License-Identifier: BSD-3-Clause
"""Check pool files: every index word, record and checksum, without the code that wrote them. Exit 1 on problems."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tmemd.cli import common, work
from tmemd.store import check
from tmemd.store.poolfile import PoolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("names", nargs="+", metavar="NAME|FILE", help="a pool's name, or a path with a '/' in it")
    parser.add_argument("--strict", action="store_true", help="let notes count as problems")
    common.add_where(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check them all."""
    paths = [_path(arguments, pool) for pool in dict.fromkeys(arguments.names)]
    with work.bar() as advance:
        reports = [
            check.check_pool(path, lambda what, done, total: advance(description=what, completed=done, total=total))
            for path in paths
        ]
    if arguments.json:
        common.print_json([{"ok": report.ok, **dataclasses.asdict(report)} for report in reports])
    else:
        for report in reports:
            _print(report)
    return int(not all(report.ok and not (arguments.strict and report.notes) for report in reports))


def _path(arguments: argparse.Namespace, pool: str) -> Path:
    if "/" in pool:
        return Path(pool)
    # Not Client.pool(): that has nothing to say of a damaged pool.
    for status in common.client(arguments).pools():
        if status.name == pool:
            return Path(status.path)
    raise PoolError(f"there is no pool {pool}; a path to a pool file needs a '/' in it")


def _print(report: check.Report) -> None:
    more = [f"and {report.more_problems} problems more"] if report.more_problems else []
    for line in (*report.problems, *more, *(f"note: {note}" for note in report.notes)):
        print(f"{report.path}: {line}")
    pages = ", ".join(f"{count} {place}" for place, count in report.pages.items() if count)
    print(
        f"{report.path}: {'ok' if report.ok else 'DAMAGED'}: {pages or 'no'} pages; {report.records} records in"
        f" {report.spans} spans are right{', while in use' if report.served else ''}"
    )
