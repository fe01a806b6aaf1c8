# SPDX-License-Identifier: BSD-3-Clause
"""Builds crash/recorder.c and says how to run a program under it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def build_recorder(directory: Path) -> Path:
    """Compile the shim into *directory*."""
    library = directory / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return library


def recording(
    library: Path,
    below: Path,
    record: Path,
    faults: str = "",
    *,
    away: Path | None = None,
    full: Path | None = None,
    threads: bool = False,
) -> dict[str, str]:
    """An environment in which changes of files below *below* are recorded to *record*, with *faults* (recorder.c).

    *away*: the file that is there while a server is away; *full*: that while there is no room on the disk. *threads*:
    they are started in spite of faults.
    """
    variables = {
        "LD_PRELOAD": str(library), "RECORD_BELOW": str(below), "RECORD_TO": str(record), "RECORD_FAULTS": faults,
    }  # fmt: skip
    if away:
        variables["RECORD_AWAY"] = str(away)
    if full:
        variables["RECORD_FULL"] = str(full)
    if threads:
        variables["RECORD_THREADS"] = "yes"
    return os.environ | variables
