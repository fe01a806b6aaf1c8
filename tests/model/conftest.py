# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the model tests; a module whose device is to be another has a `rig` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.model.rig import PAGES, OpenDevice, Rig
from tests.support.content import PAGE
from tests.support.harness import MIB


@pytest.fixture
def core_device(pools: Path, disk: Path) -> Iterator[OpenDevice]:
    """Opens core devices and closes them in the end: core_device(size, limit, disk=..., pools=..., durable=...)."""
    with ExitStack() as stack:

        def opened(
            size: int, limit: int, *, disk: Path | None = disk, pools: Path = pools, durable: bool = False
        ) -> Rig:
            rig = Rig(pools, disk, size, limit, durable=durable)
            stack.callback(rig.close)
            return rig

        yield opened


@pytest.fixture
def rig(core_device: OpenDevice) -> Rig:
    """A device with room for all its pages."""
    return core_device(PAGES * PAGE, 16 * MIB)
