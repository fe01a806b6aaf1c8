# SPDX-License-Identifier: BSD-3-Clause
"""All mutants of the tree, and an even choice of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from tests.mutants import c_rules, python_rules
from tests.mutants.mutant import Fault, Mutant, name_all

# Where what is promised is kept. Generated and bought code is not ours to break.
SOURCES: Final = (
    "tmemd/core/*.c", "tmemd/core/*.h", "tmemd/vhost/*.c", "tmemd/device/*.py", "tmemd/store/*.py",
    "tmemd/governor/*.py", "tmemd/daemon/*.py", "tmemd/daemonconfig.py", "tmemd/operations.py", "tmemd/settings.py",
)  # fmt: skip
_RULES: Final[dict[str, Callable[[bytes], Iterator[Fault]]]] = {
    ".c": c_rules.faults, ".h": c_rules.faults, ".py": python_rules.faults,
}  # fmt: skip


def mutants_of(root: Path, patterns: Iterable[str] = SOURCES) -> list[Mutant]:
    """Every mutant that the rules make of the files below *root*, in their order."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    found: list[Mutant] = []
    for path in files:
        source = path.read_bytes()
        found += name_all(str(path.relative_to(root)), source, _RULES[path.suffix](source))
    return found


def choose(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """*count* of them: from each file and rule one, then from each another, and so on, in an order that *seed* decides.

    It goes by the ids alone, so an edit elsewhere changes the choice by little.
    """
    groups: defaultdict[tuple[str, str], list[tuple[str, Mutant]]] = defaultdict(list)
    for mutant in mutants:
        draw = hashlib.sha256(f"{seed}:{mutant.id}".encode()).hexdigest()
        groups[mutant.file, mutant.rule].append((draw, mutant))
    rounds = [
        (round_, draw, mutant)
        for group in groups.values()
        for round_, (draw, mutant) in enumerate(sorted(group, key=lambda drawn: drawn[0]))
    ]
    return [mutant for *_, mutant in sorted(rounds, key=lambda drawn: drawn[:2])[:count]]
