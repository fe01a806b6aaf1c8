# SPDX-License-Identifier: BSD-3-Clause
"""Print what gives a device to a guest: to be pasted into QEMU's command line, libvirt's domain, the guest's fstab.

Without an option, all of it. docs/guests.md and docs/cache-devices.md explain each.
"""

from __future__ import annotations

import argparse

from tmemd.cli import common
from tmemd.definitions import attachment, definition
from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.store.poolfile import PoolError

_HEADINGS = {
    "qemu": "options of QEMU", "libvirt": "for libvirt (virsh edit, or virsh attach-device)", "nbd": "its URI, by NBD",
    "fstab": "in the guest's /etc/fstab, after a mkswap there",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.add_argument("name", metavar="NAME", help="the device's name")
    one = parser.add_mutually_exclusive_group()
    for kind in attachment.KINDS:
        one.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=f"only {_HEADINGS[kind]}")
    parser.add_argument("--vhost", action="store_true", help="for its virtio door; the guest's memory must be shared")


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    place = Place.of_environment()
    device = definition.load(place, arguments.name)
    texts = attachment.texts(place, device, vhost=arguments.vhost)
    if arguments.kind and arguments.kind not in texts:
        door = " by virtio" if arguments.vhost else ""
        raise PoolError(f"device {device.name} has no --{arguments.kind}{door}: there are {', '.join(texts)}")
    if arguments.json:
        common.print_json({"name": device.name} | texts)
    elif arguments.kind:
        print(texts[arguments.kind], end="")
    else:
        tell(place, device, vhost=arguments.vhost)
    return 0


def tell(place: Place, device: Definition, *, vhost: bool) -> None:
    """Print all that may be pasted, each under its heading."""
    for kind, text in attachment.texts(place, device, vhost=vhost).items():
        print(f"{_HEADINGS[kind]}:\n")
        print("".join(f"    {line}\n" for line in text.splitlines()))
