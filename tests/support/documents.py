# SPDX-License-Identifier: BSD-3-Clause
"""Documents in Markdown: what they show as it is, their headings, and where their links lead."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prose(text: str) -> str:
    """The text without what is shown as it is: code, in blocks and in lines."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?:^|\n\n)(?: {4}.*\n+)+", "\n\n", text))


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[tuple[Path, str]]:
    """Where the links of a document within its tree lead: a file, and an anchor or nothing."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(path.read_text()))
    parts = (link.partition("#") for link in found if "://" not in link)
    return [((path.parent / file).resolve() if file else path, anchor) for file, _, anchor in parts]


def dead_links(path: Path) -> list[tuple[Path, str]]:
    """Those of a document that lead to no file, or to no heading of it."""
    return [
        (file, anchor)
        for file, anchor in links(path)
        if not file.exists() or (anchor and anchor not in anchors(file.read_text()))
    ]


def commands_of(document: str, heading: str) -> list[list[str]]:
    """The blocks of commands below a heading of a document."""
    section = re.split(rf"^#+ {heading}$", (ROOT / document).read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"(?:^    .+\n)+", section, flags=re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def recipe_of(command: str) -> list[str]:
    """The last command that a line `make TARGET` of a document runs, in words; also when make itself runs us."""
    words = [*shlex.split(command, comments=True), "--dry-run", "--no-print-directory"]
    return shlex.split(subprocess.check_output(words, cwd=ROOT, text=True).splitlines()[-1])
