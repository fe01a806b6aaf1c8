# SPDX-License-Identifier: BSD-3-Clause
"""Start a device, and return when it is served; at each boot systemd does."""

from __future__ import annotations

import argparse

from tmemd.cli import devices

add_arguments = devices.add_device


def run(arguments: argparse.Namespace) -> int:
    """Start it."""
    devices.devices().start(arguments.name)
    devices.print_state(arguments, "running")
    return 0
