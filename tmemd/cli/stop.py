# SPDX-License-Identifier: BSD-3-Clause
"""Stop a device until it is started, or the host boots.

Its server is killed, which loses nothing: pages stay, in RAM and in the file, and a guest with a reconnect-delay waits.
"""

from __future__ import annotations

import argparse

from tmemd.cli import devices

add_arguments = devices.add_device


def run(arguments: argparse.Namespace) -> int:
    """Stop it."""
    devices.devices().stop(arguments.name)
    devices.print_state(arguments, "stopped")
    return 0
