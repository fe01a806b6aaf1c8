# SPDX-License-Identifier: BSD-3-Clause
"""Make a device: its definition, user, directory and service; start it, and say how a guest gets it.

All of it is there afterwards, or nothing.
"""

from __future__ import annotations

import argparse

from tmemd.cli import attach_info, common, devices
from tmemd.cli.set import weight
from tmemd.definitions import attachment, files
from tmemd.definitions.definition import check_name, check_option
from tmemd.settings import MAX_WEIGHT
from tmemd.sizes import size_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    devices.add_device(parser)
    add = parser.add_argument
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--size", type=devices.size_text, metavar="SIZE", help="of a swap device, as 8G")
    kind.add_argument("--source", metavar="IMAGE", help="a cache device of this image or disk")
    add("--backing", metavar="DIR|FILE|DEV|none",
        help="where pages go that RAM does not take: a directory, a new file, a disk; none: nowhere")  # fmt: skip
    add("--weight", type=weight, metavar="N", help=f"its share of RAM is in proportion to this (1 to {MAX_WEIGHT})")
    add("--cap", type=size_argument, metavar="SIZE", help="it never has more RAM than this")
    add("--minimum", type=size_argument, metavar="SIZE", help="it never has less RAM than this, while it wants it")
    add("--vhost", action="store_true", help="let guests that share their memory reach it by virtio as well")
    add("-o", "--option", action="append", default=[], metavar="KEY=VALUE",
        help="a further option of the device, as lost=zero (man nbdkit-tmem-plugin); may be repeated")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Make it."""
    if arguments.source and arguments.backing:
        arguments.parser.error("--backing is not for devices with --source")
    name, options = check_name(arguments.name), list(map(check_option, arguments.option))
    host = devices.devices()
    if arguments.vhost:
        options.append(f"vhost={host.place.vhost(name)}")
    wanted = files.plan(
        host.place, name, size=arguments.size, backing=arguments.backing, source=arguments.source, options=options
    )
    settings = {key: value for key in ("weight", "cap", "minimum") if (value := getattr(arguments, key)) is not None}
    host.create(wanted, settings)
    if arguments.json:
        common.print_json(
            {"name": name, "state": "running"} | attachment.texts(host.place, wanted, vhost=arguments.vhost)
        )
    else:
        print(f"{name} is served. To give it to a guest ('tmemctl attach-info {name}'):\n")
        attach_info.tell(host.place, wanted, vhost=arguments.vhost)
    return 0
