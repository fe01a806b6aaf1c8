# SPDX-License-Identifier: BSD-3-Clause
"""What the commands share that make devices and look after them."""

from __future__ import annotations

import argparse

from tmemd.cli import common
from tmemd.definitions.devices import Devices
from tmemd.definitions.place import Place
from tmemd.sizes import size_argument


def add_device(parser: argparse.ArgumentParser) -> None:
    """The device's name."""
    parser.add_argument("name", metavar="NAME", help="the device's name")


def devices() -> Devices:
    """Those of this host."""
    return Devices(Place.of_environment(), tell=common.warn)


def print_state(arguments: argparse.Namespace, state: str) -> None:
    """With --json, what became of the device."""
    if arguments.json:
        common.print_json({"name": arguments.name, "state": state})


def size_text(text: str) -> str:
    """A size on an argparse command line, as it was written."""
    size_argument(text)
    return text
