# SPDX-License-Identifier: BSD-3-Clause
"""What keeps tmemd from doing as it was told, in the same words for whoever looks: log, list, top, host and metrics."""

from __future__ import annotations

import logging
from typing import Final

from tmemd.daemon.sdnotify import notify
from tmemd.protocol import Problem

_log: Final = logging.getLogger("tmemd")


class Problems:
    """Those there are now. Nothing of it stops tmemd: it does what it can, and tries again."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def note(self, what: str, words: str | None) -> None:
        """Of *what*, a word, this is wrong now; None: nothing is. It is logged when it changes."""
        before = self._found.get(what)
        if words == before:
            return
        if words is None:
            del self._found[what]
            _log.info("mended: %s", before)
        else:
            self._found[what] = words
            _log.error("%s", words)
        notify(f"STATUS={'; '.join(self._found.values()) or 'as it should be'}")

    def of(self, what: str) -> str | None:
        """What is wrong with that, if anything is."""
        return self._found.get(what)

    def all(self) -> list[Problem]:
        """In the order in which they came."""
        return [Problem(what, words) for what, words in self._found.items()]
