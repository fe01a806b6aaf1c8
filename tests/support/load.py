# SPDX-License-Identifier: BSD-3-Clause
"""Load on a device through either door, by the program in tests/support/frontend (see `build/frontend --help`)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from tests.support.harness import ROOT, Door
from tests.support.leftovers import dying_with_us

PROGRAM: Final = ROOT / "build" / "frontend"

Option: TypeAlias = str | float | Path | bool


class Report(msgspec.Struct, frozen=True):
    """What a load tells at its end."""

    requests: int
    seconds: float
    per_second: float
    p50_ns: int
    p99_ns: int
    server_cpu_seconds: float  # of the process whose `pid` was given
    own_cpu_seconds: float
    failed: int  # requests
    wrong: int  # pages
    returns: int  # of a server that had gone


def build(*targets: str) -> None:
    """Have make make the program, or these *targets*."""
    subprocess.run(["make", "--silent", "-C", ROOT, *(targets or ["build/frontend"])], check=True)


class Load:
    """A load that runs, until `report`; *options* are the program's, a flag is True."""

    def __init__(self, door: Door, socket: Path, **options: Option) -> None:
        words = [f"--{door}", str(socket)]
        for name, value in options.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        command = dying_with_us([PROGRAM, *words])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def report(self) -> Report:
        """Wait for its end. Raises RuntimeError with its message when it could not do its work."""
        output, said = self._process.communicate()
        if not output:
            raise RuntimeError(said.strip() or f"the load ended with status {self._process.returncode}")
        return msgspec.json.decode(output, type=Report)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()


def load(door: Door, socket: Path, **options: Option) -> Report:
    """Put a load on a device and wait for its end."""
    with Load(door, socket, **options) as running:
        return running.report()
