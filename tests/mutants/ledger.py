# SPDX-License-Identifier: BSD-3-Clause
"""What became of each mutant, in a file that outlives the run, and why those that survive may."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec
from rich.table import Table

from tests.mutants.mutant import Mutant

CAUGHT: Final = "caught"
HUNG: Final = "hung"  # caught: a test took many times longer than it does
SURVIVED: Final = "survived"
SAME: Final = "same code"  # the compiler makes the same of it
INVALID: Final = "does not compile"

Verdict = Literal["caught", "hung", "survived", "same code", "does not compile"]


class Result(msgspec.Struct, frozen=True):
    """A line of the ledger."""

    id: str
    verdict: Verdict
    by: str  # the test that noticed
    seconds: float
    source: str  # hash of the file that was mutated, as it was
    tests: str  # hash of all tests

    @property
    def is_caught(self) -> bool:
        return self.verdict in {CAUGHT, HUNG}


class Ledger:
    """The results so far. What was caught stays so while its file is as it was, what survived while tests are too."""

    def __init__(self, path: Path, forget: Container[str] = ()) -> None:
        """Read what is known, except of the mutants to *forget*."""
        self._path = path
        self._results: dict[str, Result] = {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                result = msgspec.json.decode(line, type=Result)
            except msgspec.DecodeError:
                continue  # torn: its writer was killed
            if result.id not in forget:
                self._results[result.id] = result

    def of(self, mutant: Mutant, source: str, tests: str) -> Result | None:
        """What is known of it and still holds."""
        result = self._results.get(mutant.id)
        if result is None or result.source != source:
            return None
        return None if result.verdict == SURVIVED and result.tests != tests else result

    def add(self, result: Result) -> None:
        """Keep a result, at once."""
        self._results[result.id] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._is_torn()
        with self._path.open("ab") as file:
            file.write(b"\n" * torn + msgspec.json.encode(result) + b"\n")

    def _is_torn(self) -> bool:
        data = self._path.read_bytes() if self._path.exists() else b""
        return bool(data) and not data.endswith(b"\n")

    def killers(self, mutant: Mutant) -> Counter[str]:
        """The tests that caught mutants of its file, or by its rule of its folder, and how many."""

        def is_like(other: str) -> bool:
            file, _, rule, *_ = other.split(":")
            return file == mutant.file or (rule == mutant.rule and Path(file).parent == Path(mutant.file).parent)

        return Counter(each.by for each in self._results.values() if each.is_caught and is_like(each.id))


class Explained(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why no test can notice a mutant."""

    id: str
    why: str


def explanations(path: Path) -> dict[str, str]:
    """Survivors that are explained, with the reason. Raises msgspec.ValidationError for a list that is none."""
    listed = msgspec.convert(tomllib.loads(path.read_text()).get("survivor", []), list[Explained])
    return {each.id: each.why for each in listed}


class Score:
    """The sum of results. What compiles to the same code, or not at all, does not count, nor what is explained."""

    def __init__(self, results: Iterable[tuple[Mutant, Result]], explained: dict[str, str]) -> None:
        self.all = list(results)
        self._explained = explained

    @property
    def counted(self) -> list[tuple[Mutant, Result]]:
        """Mutants that a test should notice."""
        void = {SAME, INVALID}
        return [(m, r) for m, r in self.all if r.is_caught or (r.verdict not in void and m.id not in self._explained)]

    @property
    def survivors(self) -> list[Mutant]:
        """Those that none noticed, and that nobody explains."""
        return [mutant for mutant, result in self.counted if not result.is_caught]

    @property
    def share(self) -> float:
        """How many were caught, 0 to 1."""
        return 1 - len(self.survivors) / max(len(self.counted), 1)

    def table(self) -> Table:
        """By rule and by file."""
        table = Table("", "caught", "of", "survived", "explained", "same code", "invalid")
        for title, key in (("rule", _rule), ("file", _file)):
            table.add_section()
            for name in sorted({key(mutant) for mutant, _ in self.all}):
                table.add_row(name, *self._row([(m, r) for m, r in self.all if key(m) == name]))
            table.add_row(f"[bold]every {title}", *self._row(self.all))
        return table

    def _row(self, results: list[tuple[Mutant, Result]]) -> list[str]:
        part = Score(results, self._explained)
        verdicts = Counter(result.verdict for _, result in results)
        caught = verdicts[CAUGHT] + verdicts[HUNG]
        explained = verdicts[SURVIVED] - len(part.survivors)
        numbers = len(part.counted), len(part.survivors), explained, verdicts[SAME], verdicts[INVALID]
        return [str(caught), *(str(number or "") for number in numbers)]


def _rule(mutant: Mutant) -> str:
    return mutant.rule


def _file(mutant: Mutant) -> str:
    return mutant.file
