# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fakes


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory on tmpfs that other users can reach."""
    with fakes.on_tmpfs() as path:
        yield path


@pytest.fixture
def directory() -> Iterator[Path]:
    """The same, for pools themselves."""
    with fakes.on_tmpfs() as path:
        yield path


@pytest.fixture(autouse=True)
def _no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is defined on this machine is nothing to the tests."""
    monkeypatch.setenv("TMEMD_ROOT", "/nonexistent")
