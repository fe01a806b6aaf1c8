# SPDX-License-Identifier: BSD-3-Clause
"""What was meant by a word that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to put behind an error about *word*: "; did you mean 'list'?", or '' where nothing known is like it."""
    found = get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
