# SPDX-License-Identifier: BSD-3-Clause
"""A disk that does not answer: what a server does to its backing file waits while a gate is closed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.harness import wait_until


@dataclass(frozen=True)
class Call:
    """What the server did to the backing file or its map."""

    name: str
    offset: int
    length: int
    held: bool


class Gate:
    """Holds up what is done to a disk while it is closed (gate.c)."""

    def __init__(self, directory: Path, disk: Path) -> None:
        library, source = directory / "gate.so", Path(__file__).with_name("gate.c")
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
        self._path, self._log = directory / "gate", directory / "gate.log"
        self.wrapper = ("env", f"LD_PRELOAD={library}", f"GATED={disk}", f"GATE={self._path}")

    @contextmanager
    def closed(self, what: str = "") -> Iterator[None]:
        """Hold up *what*, as gate.c says it, or everything, for the length of a with block."""
        self._log.unlink(missing_ok=True)
        self._path.with_suffix(".new").write_text(what)
        self._path.with_suffix(".new").rename(self._path)
        try:
            yield
        finally:
            self.open()

    def failing(self, what: str) -> AbstractContextManager[None]:
        """Let *what* fail with EIO for the length of a with block; 'short': reads be short."""
        return self.closed(f"!{what}")

    def open(self) -> None:
        """Let everything pass."""
        self._path.unlink(missing_ok=True)

    def calls(self, name: str = "") -> list[Call]:
        """All calls, or those of that name, since it was closed."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        words = [line.split() for line in lines]
        calls = [Call(call, int(offset), int(length), held == "1") for call, offset, length, held in words]
        return [call for call in calls if name in ("", call.name)]

    def wait_for(self, n: int, what: str) -> None:
        """Return when so many calls are held up."""
        wait_until(lambda: sum(call.held for call in self.calls()) >= n, what)
