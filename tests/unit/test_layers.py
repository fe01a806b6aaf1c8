# SPDX-License-Identifier: BSD-3-Clause
"""The code has the layers that docs/architecture.md shows: includes, symbols and imports only point downwards."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.harness import ROOT
from tmemd.binding import _core

CORE = ROOT / "tmemd" / "core"
VHOST = ROOT / "tmemd" / "vhost"
C_TABLES = {"The core": CORE, "The virtio door": VHOST}
LENT = {"tmem", "statistics", "thread"}  # what the door has of the core

PYTHON = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("plugin", "tmemd")
    for path in (ROOT / folder).rglob("*.py")
}


def layers_of(heading: str) -> dict[str, int]:
    """The height of each module in the table below a heading; the lowest layer is 0."""
    section = (ROOT / "docs/architecture.md").read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in section.splitlines() if row.startswith("| `")]
    return {module: len(rows) - height for height, row in enumerate(rows, 1) for module in row}


def upward(module: str, used: Iterable[str], layers: dict[str, int]) -> list[str]:
    """What a module uses that is not below it."""
    return sorted(other for other in used if other != module and layers[other] >= layers[module])


def modules_of(folder: Path) -> list[str]:
    """The modules in C of a folder."""
    return sorted({path.stem for path in folder.glob("*.[ch]")})


def included(folder: Path, module: str) -> set[str]:
    """The modules whose headers the header and source of a module include."""
    sources = (path.read_text() for path in folder.glob(f"{module}.[ch]"))
    return {name for source in sources for name in re.findall(r'^#include "(\w+)\.h"', source, re.MULTILINE)}


class Symbols(NamedTuple):
    """The global symbols of an object file."""

    defined: set[str]
    wanted: set[str]


@pytest.fixture(scope="module", params=C_TABLES)
def table(request: pytest.FixtureRequest) -> str:
    """The heading of a table of modules in C."""
    return str(request.param)


@pytest.fixture(scope="module")
def objects(table: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Symbols]:
    """The symbols of each module in it."""
    place = tmp_path_factory.mktemp("objects")
    sources = sorted(map(str, C_TABLES[table].glob("*.c")))
    subprocess.run(["gcc", "-std=c11", "-pthread", f"-I{CORE}", "-c", *sources], cwd=place, check=True)
    return {path.stem: _symbols(path) for path in place.glob("*.o")}


def _symbols(path: Path) -> Symbols:
    rows = [line.split() for line in subprocess.check_output(["nm", "-g", path], text=True).splitlines()]
    defined = {row[2] for row in rows if len(row) == 3 and not row[2].startswith("_.stapsdt")}
    return Symbols(defined, {row[1] for row in rows if len(row) == 2})


def test_each_module_in_c_has_its_layer(table: str) -> None:
    assert sorted(layers_of(table)) == modules_of(C_TABLES[table])


def test_includes_point_downwards(table: str) -> None:
    folder, lent = C_TABLES[table], LENT if table == "The virtio door" else set()
    used = {module: included(folder, module) - lent for module in modules_of(folder)}
    found = {module: upward(module, others, layers_of(table)) for module, others in used.items()}
    assert {module: up for module, up in found.items() if up} == {}


def test_symbols_point_downwards(table: str, objects: dict[str, Symbols]) -> None:
    home = {name: module for module, symbols in objects.items() for name in symbols.defined}
    layers = layers_of(table)
    found = {
        module: upward(module, {home[name] for name in symbols.wanted & home.keys()}, layers)
        for module, symbols in objects.items()
    }
    assert {module: up for module, up in found.items() if up} == {}


def test_what_a_module_defines_bears_its_name(table: str, objects: dict[str, Symbols]) -> None:
    public = "tm_" if table == "The core" else "vhost_"
    for module, symbols in objects.items():
        one = module.removesuffix("s")
        assert [
            name for name in symbols.defined if not name.startswith((public, f"{one}_", f"un{one}_", f"{module}_"))
        ] == []


def imported(path: Path) -> set[str]:
    """The modules of ours that a Python file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{each.name}" for each in node.names} | {str(node.module)}
    known = PYTHON.keys() | {"tmemd.binding._core"}
    return {name for name in names if name in known and name != "tmemd"}


def package_of(module: str) -> str:
    """The part of tmemd that a module is, or is in."""
    return module.removeprefix("tmemd.").split(".", 1)[0]


@pytest.mark.parametrize("package", sorted({package_of(module) for module in PYTHON} - {"tmemd"}))
def test_imports_point_downwards(package: str) -> None:
    used = {
        package_of(name) for module, path in PYTHON.items() if package_of(module) == package for name in imported(path)
    }
    assert upward(package, used, layers_of("Python")) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    # Packages import their own modules' names on purpose; whoever imports such a module runs the package first.
    graph = {module: imported(path) - {module, module.rpartition(".")[0]} for module, path in PYTHON.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_an_arrow_upwards_is_seen() -> None:
    assert upward("low", ["low", "high", "same", "lower"], {"low": 1, "same": 1, "high": 2, "lower": 0}) == [
        "high", "same",
    ]  # fmt: skip


def is_defined(function: str, module: str) -> bool:
    """Whether a module of that name, in C or in Python, has that function, inline ones and methods included."""
    c = "".join(path.read_text() for folder in (CORE, VHOST) for path in folder.glob(f"{module}.[ch]"))
    python = "".join(path.read_text() for path in PYTHON.values() if path.stem == module)
    definition = rf"^(static inline )?\w[\w *]*\b{function}\([^;]*?\)\n?\s?{{|^ *def {function}\("
    return re.search(definition, c + python, re.MULTILINE) is not None


def test_the_paths_name_functions_of_their_modules_and_return_to_none() -> None:
    section = (ROOT / "docs/architecture.md").read_text().partition("\n## Paths\n")[2].partition("\n## ")[0]
    paths = [re.findall(r"`(\w+)` \((\w+)", row) for row in section.splitlines() if "→" in row]
    assert len(paths) == 14
    for path in paths:
        assert [function for function, module in path if not is_defined(function, module)] == []
        modules = [module for _, module in path]
        assert len(modules) == len(set(modules)) <= 8


def test_the_binding_carries_the_probes_that_are_documented() -> None:
    section = (ROOT / "docs/architecture.md").read_text().partition("\n## Looking inside\n")[2].partition("\n## ")[0]
    documented = re.search(r"`tmem:(\w+)`((?:, `\w+`)*) and `(\w+)`", section)
    assert documented
    names = {documented[1], *re.findall(r"\w+", documented[2]), documented[3]}
    notes = subprocess.check_output(["readelf", "--notes", "--wide", _core.__file__], text=True)
    assert set(re.findall(r"Provider: tmem\s+Name: (\w+)", notes)) == names
