# SPDX-License-Identifier: BSD-3-Clause
"""Tell systemd how the service is doing (sd_notify); without systemd, nothing."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send *state*, such as 'READY=1', to the service manager if there is one. Raises nothing: it is only news."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            manager.sendall(state.encode())
    except OSError:
        return
