"""The C core without Python, under the sanitizers: no warning, no wrong page."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.harness import ROOT

CORE = ROOT / "tmemd" / "core"
HERE = Path(__file__).parent
OPTIONS = {
    # Its deadlock detector gives up at 64 locks held, and a trim holds 512.
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 detect_deadlocks=0",
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}


def build(directory: Path, name: str, sanitizers: str, *options: str) -> Path:
    """Compile the core and the program *name*.c with *sanitizers* and the linker's *options*."""
    program = directory / name
    sources = [HERE / f"{name}.c", *CORE.glob("*.c")]
    subprocess.run(
        ["gcc", "-std=c11", "-g", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-Wall", "-Wextra",
         "-Werror", f"-I{CORE}", *map(str, sources), "-o", str(program), "-pthread", "-llz4", "-lisal", *options],
        check=True,
    )  # fmt: skip
    return program


@pytest.fixture(scope="module", params=[("thread", 10_000), ("address,undefined", 60_000)], ids=lambda it: it[0])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The stress program, instrumented, and how many operations each thread does in a few seconds."""
    sanitizers, operations = request.param
    return str(build(tmp_path_factory.mktemp("stress"), "stress", sanitizers)), str(operations)


@pytest.mark.parametrize("mode", ["file", "durable", "ram"])
def test_invariants_3_and_5_threads_on_overlapping_pages_under_sanitizers(program: tuple[str, str], mode: str) -> None:
    run([*program, "1", mode])


def test_promotion_neither_waits_nor_brings_back_what_was_overwritten(tmp_path: Path) -> None:
    run([str(build(tmp_path, "promotion", "address,undefined", "-Wl,--wrap=unlock_io"))])


def test_a_full_pool_does_not_compress_what_it_refuses(tmp_path: Path) -> None:
    run([str(build(tmp_path, "refusal", "address,undefined"))])


def test_latencies_fall_into_the_buckets_they_should(tmp_path: Path) -> None:
    run([str(build(tmp_path, "buckets", "address,undefined"))])


def run(command: list[str]) -> None:
    """Run a program that says 'ok' and nothing else when nothing is wrong."""
    result = subprocess.run(command, env=os.environ | OPTIONS, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
