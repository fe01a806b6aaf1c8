# SPDX-License-Identifier: BSD-3-Clause
"""What documents point at is there: files, headings, targets of make, commands of tmemctl."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import commands_of, dead_links, links, recipe_of
from tests.support.harness import ROOT
from tmemd.cli.commands import COMMANDS

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path: path.read_text() for path in DOCUMENTS}
OLD = {"settle"}  # what documents name as the old name of another
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_the_readme_leads_to_every_document() -> None:
    reached, found = set[Path](), {ROOT / "README.md"}
    while found - reached:
        path = (found - reached).pop()
        reached.add(path)
        files = {file for file, _ in links(path)}
        found |= {each for file in files for each in ([file] if file in TEXTS else file.glob("*.md"))}
    assert set(DOCUMENTS) - reached == set()


def test_the_readme_is_no_book() -> None:
    assert len(TEXTS[ROOT / "README.md"].encode()) <= 9000


def words_after(command: str, text: str) -> set[str]:
    """What stands behind a command where one is shown: in code, or at the begin of a line of a block."""
    return set(re.findall(rf"(?:`|^ +){command} ([a-z][a-z-]*)", text, flags=re.MULTILINE))


@each_document
def test_what_is_typed_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert words_after("make", TEXTS[path]) - targets == set()
    assert words_after("tmemctl", TEXTS[path]) - set(COMMANDS) - OLD == set()


def test_what_virsh_is_told_is_tried() -> None:
    tried = "".join((ROOT / "tests" / path).read_text() for path in ("vm/test_libvirt.py", "support/virt.py"))
    told = words_after("virsh", TEXTS[ROOT / "docs/guests.md"].partition("## libvirt\n")[2].partition("\n## ")[0])
    assert {word for word in told if f'"{word}"' not in tried} <= {"attach-disk", "dumpxml", "edit"}


@pytest.mark.parametrize("command", commands_of("README.md", "Try it")[-1])
def test_the_readme_s_tests_are_pytest_s(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")  # as in `make test`, where make says more
    assert recipe_of(command)[0] == "pytest"
