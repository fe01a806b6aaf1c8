# SPDX-License-Identifier: BSD-3-Clause
"""Where tests mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mountable(path: Path) -> Iterator[Path]:
    """A directory that is unmounted again, or a skip where nothing can be mounted."""
    path.mkdir(exist_ok=True)
    probe = subprocess.run(["mount", "-t", "tmpfs", "probe", path], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"cannot mount here: {probe.stderr.strip()}")
    subprocess.run(["umount", path], check=True)
    try:
        yield path
    finally:
        while path.is_mount():
            subprocess.run(["umount", path], check=True)
