# SPDX-License-Identifier: BSD-3-Clause
"""Restart a device, also under a running guest, and return when it is served again.

Its server is killed, and the next one finds every page. A guest with a reconnect-delay waits; no request of it fails.
"""

from __future__ import annotations

import argparse

from tmemd.cli import devices

add_arguments = devices.add_device


def run(arguments: argparse.Namespace) -> int:
    """Restart it."""
    devices.devices().restart(arguments.name)
    devices.print_state(arguments, "running")
    return 0
