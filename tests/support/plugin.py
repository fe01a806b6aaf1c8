# SPDX-License-Identifier: BSD-3-Clause
"""A plugin as far as requests through the control page go."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.support import fakes
from tests.support.harness import waiting
from tmemd.store import poolfile, requests
from tmemd.store.requests import Queued


class Plugin(threading.Thread):
    """Serves a pool as far as its requests go, which it answers with *error*, with *left* pages in tmem then.

    With None it dies at the first instead.
    """

    def __init__(self, directory: Path, name: str, error: int | None, left: int = 0) -> None:
        super().__init__()
        self._fd = os.open(directory / f"{name}.pool", os.O_RDWR)
        self._error, self._left = error, left
        self._over = threading.Event()
        self.asked: list[Queued] = []
        assert poolfile.lock(self._fd)

    def run(self) -> None:
        while not self._over.wait(0.01) and (self._error is not None or not self.asked):
            for request in waiting(self._fd):
                self.asked.append(request)
                if self._error is None:
                    break
                fakes.write_counters(self._fd, fakes.counters(pages_in_tmem=self._left))
                requests.answer(self._fd, request.number, self._error)
        os.close(self._fd)

    def __enter__(self) -> Plugin:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
