# SPDX-License-Identifier: BSD-3-Clause
"""The model and the invariants once more, in an extension built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import ROOT
from tests.support.sanitizers import LIBRARY, build

HERE = Path(__file__).parent
PARTS = [
    ["model/test_fragmentation"],
    ["model/test_model"],
    [f"model/test_{name}" for name in ("invariants", "demotion", "heat", "statistics", "promotion")],
    ["save/test_damaged"],
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """An environment in which Python finds the instrumented extension, freshly built, and can load it."""
    return os.environ | build()


@pytest.mark.parametrize("names", PARTS, ids=" ".join)
def test_under_asan_and_ubsan(environment: dict[str, str], tmp_path: Path, names: list[str]) -> None:
    where = "import tmemd.binding._core as core; print(core.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(LIBRARY))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={LIBRARY} {ROOT}"]
    tests = [str(HERE.parent / f"{name}.py") for name in names]
    result = subprocess.run(
        [*command, "-m", "not slow", f"--basetemp={tmp_path}/inner", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "runtime error" not in result.stdout + result.stderr
