"""Fixtures of the model tests; a module whose device is to be another has a `rig` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.rig import PAGES, Rig
from tests.support.content import PAGE
from tests.support.harness import MIB


@pytest.fixture
def rig(pools: Path, disk: Path) -> Iterator[Rig]:
    """A device with room for all its pages."""
    rig = Rig(pools, disk, PAGES * PAGE, 16 * MIB)
    yield rig
    rig.close()
