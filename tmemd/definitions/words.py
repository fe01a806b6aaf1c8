# SPDX-License-Identifier: BSD-3-Clause
"""What a server that failed said of it."""

from __future__ import annotations


def why(log: str) -> str:
    """The last error in a log, or its last line, with which a traceback ends."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    told = errors if errors and not errors[-1].startswith("Traceback") else lines
    return told[-1] if told else "it says nothing"
