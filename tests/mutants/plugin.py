# SPDX-License-Identifier: BSD-3-Clause
"""A pytest plugin: the tests in the order of a plan, each with its time limit, and what became of each in a file.

    pytest -p tests.mutants.plugin --plan FILE

The file's lines are JSON: a test that begins has no seconds; one that ended has, and says whether it failed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Final

import msgspec
import pytest


class Plan(msgspec.Struct, frozen=True):
    """In what order tests run, how long each may take, and where to note what became of them."""

    notes: str
    files: list[str]  # first to last
    first: list[str] = []  # tests that go before all others
    limits: dict[str, float] = {}  # seconds, by test
    limit: float = 600.0  # for those that are not named


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """A test began, or ended."""

    test: str
    seconds: float | None = None
    failed: bool = False


class Planned:
    """The hooks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ranks = {file: rank for rank, file in enumerate(self._plan.files)}
        first = set(self._plan.first)
        items.sort(key=lambda item: (item.nodeid not in first, ranks.get(item.nodeid.partition("::")[0], len(ranks))))
        for item in items:
            limit = self._plan.limits.get(item.nodeid, self._plan.limit)
            # 'thread' ends the process, whatever its main thread hangs in.
            item.add_marker(pytest.mark.timeout(limit, method="thread"), append=False)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(Note(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note(Note(nodeid, round(self._seconds[nodeid], 3), nodeid in self._failed))

    def _note(self, note: Note) -> None:
        with Path(self._plan.notes).open("ab") as file:
            file.write(msgspec.json.encode(note) + b"\n")


OPTION: Final = "--plan"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    plan: Path = config.getoption(OPTION)
    config.pluginmanager.register(Planned(msgspec.json.decode(plan.read_bytes(), type=Plan)))


def read_notes(path: Path) -> list[Note]:
    """What was noted so far."""
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Note) for line in path.read_bytes().splitlines()]
