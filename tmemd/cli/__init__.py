# SPDX-License-Identifier: BSD-3-Clause
"""tmemctl: look at pools and change them. One module for each command."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run tmemctl; returns its exit status: 0, 1 after an error or a problem found, 130 after Ctrl-C."""
    try:
        # Most of the time until a command runs goes into this, and Ctrl-C is no error there either.
        from tmemd.cli import commands  # noqa: PLC0415

        return commands.run(argv)
    except KeyboardInterrupt:
        return 130
