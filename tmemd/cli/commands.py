# SPDX-License-Identifier: BSD-3-Clause
"""The command line of tmemctl."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from tmemd import version
from tmemd.cli import common
from tmemd.client import UnreachableError
from tmemd.store.poolfile import PoolError

COMMANDS: Final = (
    "list", "show", "top", "host", "freeable", "map", "set", "freeze", "thaw", "drain", "demote", "compact", "flush",
    "destroy", "check", "record", "simulate", "plugin-path",
)  # fmt: skip
_RENAMED: Final = {"settle": "compact"}  # old names go with the next release


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line of tmemctl, as far as these commands go."""
    parser = argparse.ArgumentParser(
        prog="tmemctl", description="Look at the pools of devices and change them.",
        epilog="Exit status: 0; 1 after an error, or a problem that was found; 2 for a wrong command line; 130 after"
        " Ctrl-C. 'tmemctl COMMAND --help' says more of each.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tmemctl {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in names:
        module = importlib.import_module(f"tmemd.cli.{command.replace('-', '_')}")
        summary = (module.__doc__ or "").partition("\n")[0]
        subparser = commands.add_parser(command, help=summary[:1].lower() + summary[1:-1], description=module.__doc__)
        module.add_arguments(subparser)
        common.add_json(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Run tmemctl; returns its exit status: 0, or 1 after an error or a problem found. Raises KeyboardInterrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and (renamed := _RENAMED.get(words[0])):
        common.warn(f"{words[0]} is called {renamed} now; the old name goes with the next release")
        words[0] = renamed
    try:
        # Loading what all commands need takes three times as long as loading one of them.
        arguments = build_parser(words[:1] if words and words[0] in COMMANDS else COMMANDS).parse_args(words)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UnreachableError as error:
        print(f"tmemctl: {error}: {_hint(error)}", file=sys.stderr)
        return 1
    except PoolError as error:
        print(f"tmemctl: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        print(f"tmemctl: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 1
    return status


def _hint(error: UnreachableError) -> str:
    if isinstance(error.reason, PermissionError):
        return "only root, tmemd's own user and its --group may ask it"
    return "is it running? (--pools DIR works without)"


def _discard_output() -> None:
    """Python flushes once more when it exits, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
