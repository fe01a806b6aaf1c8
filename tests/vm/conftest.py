# SPDX-License-Identifier: BSD-3-Clause
"""What several tests of guests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.harness import ROOT


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first file system with nothing but busybox, hog, drivers and libvirt/init."""
    return qemu.make_initrd(tmp_path_factory.mktemp("initrd"), "libvirt/init", ROOT / "build" / "hog")
