# SPDX-License-Identifier: BSD-3-Clause
"""Whoever finds one file of ours can tell what it may be used for."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.support.harness import ROOT

TAG = "SPDX-License-Identifier: BSD-3-Clause"
FOLDERS = ("plugin", "tmemd", "scripts", "tests", "benchmarks", ".ci")
C = {".c", ".h"}
HASH = {".py", ".pyi", ".pyx", ".sh", ".bash"}


def is_source(path: Path) -> bool:
    """Whether a file is C, Python, Cython, shell or a Makefile."""
    if not path.is_file():
        return False
    if path.suffix in C | HASH or path.name == "Makefile":
        return True
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def sources() -> Iterator[Path]:
    """All source files; what is built or generated lies elsewhere."""
    yield from filter(is_source, ROOT.iterdir())
    for folder in FOLDERS:
        yield from filter(is_source, (ROOT / folder).rglob("*"))


def is_tagged(path: Path) -> bool:
    """Whether the first line, or the second after a shebang, is the licence's."""
    first, second, *_ = [*path.read_text().splitlines()[:2], "", ""]
    return (second if first.startswith("#!") else first) == (f"/* {TAG} */" if path.suffix in C else f"# {TAG}")


def test_every_source_file_says_its_license() -> None:
    found = list(sources())
    assert {ROOT / name for name in ("setup.py", "Makefile", "scripts/serve", "tmemd/core/page.c")} <= set(found)
    assert [str(path.relative_to(ROOT)) for path in found if not is_tagged(path)] == []


def test_the_license_is_the_package_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == TAG.partition(": ")[2]
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License\n")
