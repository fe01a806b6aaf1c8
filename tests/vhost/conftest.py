# SPDX-License-Identifier: BSD-3-Clause
"""What tests of front ends against QEMU's back end share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file of zeros, as big as the module's SIZE says in bytes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(request.module.SIZE))
    return path
