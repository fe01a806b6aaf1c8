# SPDX-License-Identifier: BSD-3-Clause
"""A swap device that keeps what it can in RAM: transcendent memory behind NBD."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def version() -> str:
    """Of the installed package; 'unknown' in a source tree that was never installed."""
    from importlib import metadata  # noqa: PLC0415 - each nbdkit imports this module, and has no use for it

    try:
        return metadata.version("tmemd")
    except metadata.PackageNotFoundError:
        return "unknown"


def plugin_path() -> Path:
    """The plugin to give to ``nbdkit python``: inside the installed package, or beside it in the source tree.

    Raises FileNotFoundError when neither is there.
    """
    for path in (_PACKAGE / "plugin" / "tmem.py", _PACKAGE.parent / "plugin" / "tmem.py"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no plugin/tmem.py in or beside {_PACKAGE}: reinstall tmemd")
