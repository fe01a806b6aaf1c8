# SPDX-License-Identifier: BSD-3-Clause
"""Set how a pool is treated, all that is given or nothing of it; tmemd remembers it, over reboots too.

Of a device that is defined (see create) it can be set before there is a pool, and holds when that comes.

The word 'default' stands for what the configuration file says or, where it says nothing, for tmemd's own default. With
--pools only --target and --compression mean anything; they are kept in the pool, and 'auto' is the device's limit=.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from tmemd.cli import common
from tmemd.client import Client
from tmemd.definitions.place import Place
from tmemd.settings import MAX_WEIGHT
from tmemd.sizes import size_argument

_FORGET: Final = "default"
_SETTINGS: Final = ("weight", "cap", "minimum", "compression", "target")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    common.add_pool(parser)
    add = parser.add_argument
    add("--weight", type=_or_word(_FORGET, weight), metavar="N|default",
        help=f"its share of RAM is in proportion to this (1 to {MAX_WEIGHT})")  # fmt: skip
    add("--cap", type=_or_word(_FORGET, _or_word("none", size_argument)), metavar="SIZE|none|default",
        help="it never has more RAM than this")  # fmt: skip
    add("--minimum", type=_or_word(_FORGET, size_argument), metavar="SIZE|default",
        help="it never has less RAM than this, while it wants it")  # fmt: skip
    add("--compression", type=_or_word(_FORGET, _on_or_off), metavar="on|off|default",
        help="whether pages put from now on are compressed")  # fmt: skip
    add("--target", type=_or_word("auto", size_argument), metavar="SIZE|auto",
        help="how much RAM it may take from now on, whatever else happens; auto: the policy finds it")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Set it."""
    given = {name: value for name in _SETTINGS if (value := getattr(arguments, name)) is not None}
    if not given:
        arguments.parser.error(f"nothing to set: say one of {', '.join(f'--{name}' for name in _SETTINGS)}")
    forget = frozenset(name for name, value in given.items() if value == _FORGET)
    settings = {
        name: None if value in ("none", "auto") else value for name, value in given.items() if name not in forget
    }
    client, is_defined = common.client(arguments), Place.of_environment().definition(arguments.name).exists()
    client.set(arguments.name, **settings, forget=forget, away=is_defined and not arguments.pools)
    if arguments.json and not is_there(client, arguments.name):
        common.print_json({"name": arguments.name, "state": "away"} | settings)
    else:
        common.print_changed(arguments)
    return 0


def is_there(client: Client, name: str) -> bool:
    """Whether there is a pool of that name."""
    return any(status.name == name for status in client.pools())


def _or_word(word: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: word if text == word else parse(text)


def weight(text: str) -> int:
    """A weight on an argparse command line."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WEIGHT):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to {MAX_WEIGHT}")
    return int(text)


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"
