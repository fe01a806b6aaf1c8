"""systemd's units, as far as they go without a systemd; tests/vm/test_systemd.py runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.harness import ROOT

UNITS = ROOT / "scripts" / "systemd"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize(
    ("unit", "instance"), [("tmemd.service",) * 2, ("tmemd-device@.service", "tmemd-device@w.service")]
)
def test_exposure_is_at_most_3(tmp_path: Path, unit: str, instance: str) -> None:
    shutil.copy(UNITS / unit, tmp_path / instance)
    command = ["systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=30", str(tmp_path / instance)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout
