# SPDX-License-Identifier: BSD-3-Clause
"""tmemd, the daemon: its socket, what it does to pools for those who ask, its metrics."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run tmemd until SIGTERM or SIGINT; returns its exit status."""
    try:
        # Loading takes a while, and Ctrl-C is no error then, nor before there is a loop that would handle it.
        from tmemd.daemon import start  # noqa: PLC0415

        return start.main(argv)
    except KeyboardInterrupt:
        return 130
