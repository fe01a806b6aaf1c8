# SPDX-License-Identifier: BSD-3-Clause
"""Write what completes tmemd's and tmemctl's command lines in bash, zsh and fish, from what they parse.

python scripts/completions.py DIR      # /usr/local/share is where these shells look
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import shtab

from tmemd.cli import commands
from tmemd.daemon import start

FILES: Final = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/site-functions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
_LIST: Final = "tmemctl list --columns name 2>/dev/null | sed 1d | tr -d ' '"
_BASH: Final = f'_tmemctl_names() {{ compgen -W "$({_LIST})" -- $1; }}'
_ZSH: Final = f"_tmemctl_names() {{ local names=($({_LIST})); compadd -a names }}"
_NAMES: Final[dict[str, str | dict[str, str]]] = {
    "bash": "_tmemctl_names",
    "zsh": "_tmemctl_names",
    "fish": f"({_LIST})",
    "preamble": {"bash": _BASH, "zsh": _ZSH},
}
_COMPLETED: Final = {"NAME": _NAMES, "NAME|FILE": _NAMES, "DIR": shtab.DIRECTORY}


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The programs' command lines, which know how their arguments are completed."""
    for parser in (start.build_parser(), commands.build_parser()):
        for action in actions(parser):
            how = _COMPLETED.get(str(action.metavar)) or (shtab.FILE if action.type is Path else None)
            if how and not (action.option_strings and how is _NAMES):
                action.complete = how  # type: ignore[attr-defined] # it is shtab's
        yield parser


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                subparser.description = (subparser.description or "").partition("\n")[0]  # beside its name
                yield from actions(subparser)


def main() -> int:
    """Write them all below the directory that is named."""
    argument = argparse.ArgumentParser(description="Write shells' completions below a directory.")
    argument.add_argument("directory", type=Path, metavar="DIR", help="as /usr/local/share")
    directory = argument.parse_args().directory
    for parser in parsers():
        for shell, name in FILES.items():
            path = directory / name.format(parser.prog)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shtab.complete(parser, shell) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
