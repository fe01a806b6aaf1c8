# SPDX-License-Identifier: BSD-3-Clause
"""Whether somebody serves NBD at a socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

_GREETING: Final = b"NBDMAGIC"


def greets(path: Path, seconds: float) -> bool:
    """Whether an NBD server greets at this socket within this time. Where systemd listens, that it starts one."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(seconds)
            sock.connect(str(path))
            return sock.recv(len(_GREETING), socket.MSG_WAITALL) == _GREETING
    except OSError:
        return False
