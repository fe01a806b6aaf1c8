# SPDX-License-Identifier: BSD-3-Clause
"""Small C programs that are linked with parts of tmemd and run under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.support.harness import ROOT

OPTIONS = {
    # Its deadlock detector gives up at 64 locks held, and a trim holds 512.
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 detect_deadlocks=0",
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}
FLAGS = ["-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror", "-pthread"]
THREAD, ADDRESS = "-fsanitize=thread", "-fsanitize=address,undefined,bounds-strict"
Build = Callable[..., str]


def builder(directory: Path, sources: Path, folders: Sequence[str]) -> Build:
    """What compiles programs of *sources* with all of tmemd's C *folders*: build(name, sanitizers, *linker's options).

    A program that includes a file of theirs itself, such as "virtqueue.c", has it instead of them. Nothing is compiled
    twice. What is built lies below *directory*.
    """
    parts = [ROOT / "tmemd" / folder for folder in folders]
    flags = [*FLAGS, *(f"-I{part}" for part in parts)]

    @cache
    def objects(sanitizers: str) -> Path:
        place = directory / f"objects{sanitizers}"
        place.mkdir()
        files = [str(path) for part in parts for path in part.glob("*.c")]
        subprocess.run(["gcc", *flags, sanitizers, "-c", *files], cwd=place, check=True)
        return place

    @cache
    def build(name: str, sanitizers: str, *options: str) -> str:
        source, program = sources / f"{name}.c", directory / f"{name}{sanitizers}"
        text = source.read_text()
        linked = [str(each) for each in objects(sanitizers).glob("*.o") if f'#include "{each.stem}.c"' not in text]
        libraries = ["-llz4", "-lisal", "-lnbd"]
        command = ["gcc", *flags, sanitizers, str(source), *linked, "-o", str(program), *libraries, *options]
        subprocess.run(command, check=True)
        return str(program)

    return build


def run(command: list[str], suppressions: Path | None = None) -> None:
    """Run a program that says 'ok' and nothing else when nothing is wrong. *suppressions* are ThreadSanitizer's."""
    options = dict(OPTIONS)
    if suppressions:
        options["TSAN_OPTIONS"] += f" suppressions={suppressions} print_suppressions=0"
    result = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
