"""Which block devices count as empty; a sparse file stands in for the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.content import PAGE
from tests.harness import MIB
from tmemd.device import backing
from tmemd.device.backing import BackingError

LENGTH, SIZE = 96 * MIB, 64 * MIB  # of the block device, and of the part of it that is used


@pytest.fixture
def block_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like a block device full of zeros."""
    path = tmp_path / "block"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == path)
    return path


def test_a_block_device_of_zeros_is_empty(block_device: Path, tmp_path: Path) -> None:
    backing.find(block_device, tmp_path / "map", SIZE).close()


@pytest.mark.parametrize("offset", [0, 256 * PAGE, 1024 * PAGE, SIZE - 386 * PAGE, SIZE - 1, LENGTH - PAGE])
def test_one_that_may_hold_a_signature_is_not(block_device: Path, tmp_path: Path, offset: int) -> None:
    with block_device.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    with pytest.raises(BackingError, match="not empty"):
        backing.find(block_device, tmp_path / "map", SIZE)
