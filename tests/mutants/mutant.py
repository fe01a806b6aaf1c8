# SPDX-License-Identifier: BSD-3-Clause
"""A mutant: one small fault put into one file, by a rule."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Bytes [start, end) of a file become *text*."""

    start: int
    end: int
    text: bytes


@dataclass(frozen=True)
class Fault:
    """What a rule found: a place where it applies, and the edits that make the fault."""

    rule: str
    function: str
    line: int
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Mutant:
    """A fault with a name."""

    id: str  # file:function:rule:ordinal:hash, the hash of what is edited: edits elsewhere do not change it
    file: str  # relative to the top of the tree
    fault: Fault

    @property
    def rule(self) -> str:
        return self.fault.rule

    def apply(self, source: bytes) -> bytes:
        """The file with the fault in it."""
        for edit in sorted(self.fault.edits, key=lambda edit: edit.start, reverse=True):
            source = source[: edit.start] + edit.text + source[edit.end :]
        return source

    def describe(self, source: bytes) -> str:
        """What it changes, for a reader."""
        parts = [(_one_line(source[edit.start : edit.end]), _one_line(edit.text)) for edit in self.fault.edits]
        return "; ".join(f"{before} => {after}" for before, after in parts)


def name_all(file: str, source: bytes, faults: Iterable[Fault]) -> list[Mutant]:
    """Give each fault of a file its id; those that change nothing are left out, and so is what another does too."""
    seen: Counter[str] = Counter()
    texts = {source}
    found = []
    for fault in sorted(faults, key=lambda fault: fault.edits[0].start):
        changes = b"\0".join(b" ".join(source[e.start : e.end].split()) + b"\0" + e.text for e in fault.edits)
        stem = f"{file}:{fault.function}:{fault.rule}"
        digest = hashlib.sha256(changes).hexdigest()[:6]
        mutant = Mutant(f"{stem}:{seen[stem + digest]}:{digest}", file, fault)
        seen[stem + digest] += 1
        if (text := mutant.apply(source)) not in texts:
            texts.add(text)
            found.append(mutant)
    return found


def _one_line(text: bytes) -> str:
    return " ".join(text.decode().split())
