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
from tmemd.store.poolfile import AwayError, PoolError
from tmemd.suggestions import suggestion

COMMANDS: Final = (
    "list", "show", "top", "host", "events", "wait", "create", "attach-info", "start", "stop", "restart", "resize",
    "rename", "remove", "freeable", "map", "hot", "set", "freeze", "thaw", "drain", "demote", "compact", "flush",
    "handover", "save", "restore", "destroy", "check", "record", "simulate", "plugin-path",
)  # fmt: skip
_RENAMED: Final = {"settle": "compact"}  # old names go with the next release


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line of tmemctl, as far as these commands go."""
    parser = argparse.ArgumentParser(
        prog="tmemctl", description="Look at the pools of devices and change them.",
        epilog="Exit status: 0; 1 after an error, or a problem that was found; 2 for a wrong command line; 75 where a"
        " device's NBD server is needed and away; 124 when wait has"
        " waited for long enough; 130 after Ctrl-C. 'tmemctl COMMAND --help' says more of each.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tmemctl {version()}")
    common.add_json(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in names:
        module = importlib.import_module(f"tmemd.cli.{command.replace('-', '_')}")
        summary = (module.__doc__ or "").partition("\n")[0]
        subparser = commands.add_parser(command, help=summary[:1].lower() + summary[1:-1], description=module.__doc__)
        module.add_arguments(subparser)
        # Suppressed, or what stands behind the command would take back what stands before it.
        common.add_json(subparser, default=argparse.SUPPRESS)
        subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """What was asked for; None where no command was named, and help was given instead. Raises SystemExit, as argparse.

    Loading what all commands need takes three times as long as loading one of them.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser([command] if command in COMMANDS else COMMANDS)
    if not set(words) - {"--json"}:
        parser.print_help()
        return None
    if command is not None and command not in COMMANDS:
        parser.error(f"there is no command {command!r}{suggestion(command, COMMANDS)}")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        known: argparse.ArgumentParser = arguments.parser
        option = unknown[0].partition("=")[0]
        known.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion(option, known._option_string_actions)}")
    return arguments


def run(argv: Sequence[str] | None = None) -> int:
    """Run tmemctl; returns its exit status: 0, 1 after an error or a problem found, AWAY. Raises KeyboardInterrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    for place, word in enumerate(words):
        if not word.startswith("-"):
            words[place] = _renamed(word)
            break
    try:
        arguments = parse(words)
        status: int = arguments.run(arguments) if arguments else 0
        sys.stdout.flush()
    except UnreachableError as error:
        print(f"tmemctl: {error}: {_hint(error)}", file=sys.stderr)
        return 1
    except PoolError as error:
        print(f"tmemctl: {error}", file=sys.stderr)
        return common.AWAY if isinstance(error, AwayError) else 1
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        print(f"tmemctl: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 1
    return status


def _renamed(command: str) -> str:
    if command not in _RENAMED:
        return command
    common.warn(f"{command} is called {_RENAMED[command]} now; the old name goes with the next release")
    return _RENAMED[command]


def _hint(error: UnreachableError) -> str:
    if isinstance(error.reason, PermissionError):
        return "only root, tmemd's own user and its group (access.group) may ask it"
    return "is it running? (--pools DIR works without)"


def _discard_output() -> None:
    """Python flushes once more when it exits, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
