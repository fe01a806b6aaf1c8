# SPDX-License-Identifier: BSD-3-Clause
"""tmemd-libvirt: the hook that libvirt runs, and the service beside it."""

from __future__ import annotations

import argparse
import sys
import syslog
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from tmemd import version
from tmemd.libvirt import devices
from tmemd.libvirt.devices import DeviceError
from tmemd.libvirt.domain import MOST_XML, DomainError, parse
from tmemd.libvirt.hook import Hook
from tmemd.libvirt.records import DIRECTORY, Records

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tmemd-libvirt",
        description="What libvirt runs when a guest that uses devices of tmemd starts, ends or is restored, and a"
        " service beside it that lets guests go on.",
        epilog="Exit status: 0; 1 after an error, which keeps libvirt from starting or restoring the guest; 2 for a"
        " wrong command line; 130 after Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"tmemd-libvirt {version()}")
    parser.add_argument("--records", type=Path, default=DIRECTORY, metavar="DIR",
        help="what became of the guest that used a device last is kept there (default: %(default)s)")  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "hook", _hook).add_argument("words", nargs=4, metavar="ARGUMENT", help="as libvirt gives them")
    _add(commands, "watch", _watch).add_argument("--connect", default="qemu:///system", metavar="URI",
        help="of libvirt (default: %(default)s)")  # fmt: skip
    _add(commands, "drain", _drain)
    return parser


def _add(commands: _Commands, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    summary = (run.__doc__ or "").partition("\n")[0]
    parser = commands.add_parser(name, help=summary[:1].lower() + summary[1:-1], description=run.__doc__)
    parser.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    return status


def _hook(arguments: argparse.Namespace) -> int:
    """Do what libvirt's hook script is called for, with the domain's XML as its input.

    Only a failure before a guest is started or restored counts: another would change nothing, or kill the guest.
    """
    name, operation, _, extra = arguments.words
    try:
        domain = parse(sys.stdin.buffer.read(MOST_XML + 1))
        Hook(Records(arguments.records)).run(name, operation, extra, domain)
    except (DeviceError, DomainError, OSError) as error:
        print(error, file=sys.stderr)  # which libvirt shows, or has in its log
        return int(operation in ("prepare", "restore"))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    """Resume guests that an I/O error of a device has paused, once it is served again, and tell their runs apart."""
    try:
        from tmemd.libvirt.watch import watch  # noqa: PLC0415
    except ModuleNotFoundError:
        print("tmemd-libvirt: libvirt's module for Python is not installed (Debian: python3-libvirt)", file=sys.stderr)
        return 1
    watch(arguments.connect)
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    """Move all pages of saved guests to their devices' files, and return when they are there.

    Who comes meanwhile waits: at shutdown all must be done on return, whoever did it.
    """
    records = Records(arguments.records)
    with records.locked():
        problems = [problem for device in records.kept() if (problem := devices.drain(device))]
    for problem in problems:
        syslog.syslog(syslog.LOG_ERR, f"of a saved guest: {problem}")
        print(problem, file=sys.stderr)
    return int(bool(problems))
