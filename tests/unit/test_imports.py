# SPDX-License-Identifier: BSD-3-Clause
"""Tests and benchmarks share what is in tests/support, and import nothing else of each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

from tests.support.harness import ROOT

FILES = sorted(path.relative_to(ROOT) for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> Iterator[PurePath]:
    """The modules of tests and benchmarks that a source imports, and the names it imports from packages, as paths."""
    for node in ast.walk(ast.parse(source)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        yield from (PurePath(*name.split(".")) for name in names if name.split(".")[0] in {"tests", "benchmarks"})


def may_import(importer: PurePath, module: PurePath) -> bool:
    """Whether a file may import a module: of tests/support, or a helper in its own folder."""
    if module.is_relative_to("tests/support"):
        return True
    is_test = any(part.startswith("test_") or part == "conftest" for part in module.parts)
    room = PurePath(*importer.parts[: 1 if importer.parts[0] == "benchmarks" else 2])
    return module.is_relative_to(room) and not is_test and not importer.is_relative_to("tests/support")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_the_support_package_is_shared(path: Path) -> None:
    modules = imported((ROOT / path).read_text())
    assert [str(module) for module in modules if not may_import(path, module)] == []


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("tests/nbd/test_a.py", "from tests.support import fakes", True),
        ("tests/support/fakes.py", "from tests.support.harness import ROOT", True),
        ("tests/crash/test_a.py", "from tests.crash.world import World", True),
        ("benchmarks/bench.py", "from benchmarks import pages", True),
        ("benchmarks/bench.py", "import tests.support.content", True),
        ("tests/nbd/test_a.py", "from tests.crash.world import World", False),
        ("tests/nbd/test_a.py", "def late():\n    from benchmarks.pages import corpus", False),
        ("tests/nbd/test_a.py", "from tests.nbd.test_b import free_port", False),
        ("tests/nbd/test_a.py", "from tests.nbd import test_b", False),
        ("tests/nbd/test_a.py", "from tests import conftest", False),
        ("tests/support/fakes.py", "import tests.nbd.world", False),
        ("benchmarks/bench.py", "from tests.crash import world", False),
    ],
)
def test_the_rule_tells_right_from_wrong(importer: str, source: str, allowed: bool) -> None:
    assert [may_import(PurePath(importer), module) for module in imported(source)] == [allowed]
