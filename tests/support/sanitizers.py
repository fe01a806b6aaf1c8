# SPDX-License-Identifier: BSD-3-Clause
"""An extension built with AddressSanitizer and UBSan, and the environment in which Python finds and loads it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from tests.support.harness import ROOT

LIBRARY = ROOT / "build" / "address-undefined" / "lib"


def runtime(name: str) -> str:
    """The full path of a sanitizer's runtime library; skips where the compiler has none."""
    result = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = result.stdout.strip()
    if path == name:
        pytest.skip(f"gcc has no {name}")
    return path


def build() -> dict[str, str]:
    """Build the instrumented extension; returns the variables under which it is used."""
    instrumented = os.environ | {"TMEMD_SANITIZE": "address,undefined"}
    LIBRARY.mkdir(parents=True, exist_ok=True)
    with (LIBRARY.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests want it at the same time
        subprocess.run([sys.executable, "setup.py", "-q", "build"], cwd=ROOT, env=instrumented, check=True)
    return {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees all it has
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{LIBRARY}:{ROOT}",
    }
