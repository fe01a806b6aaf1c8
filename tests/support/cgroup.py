# SPDX-License-Identifier: BSD-3-Clause
"""A memory cgroup of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import leftovers


class Cgroup:
    """A memory cgroup: version 1 or 2."""

    def __init__(self, path: Path, limit: int) -> None:
        self._old = (path / "memory.limit_in_bytes").exists()
        self.path = path
        self.limit = limit
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))

    @property
    def usage(self) -> int:
        """Bytes charged now."""
        return int((self.path / ("memory.usage_in_bytes" if self._old else "memory.current")).read_text())

    def kills(self) -> int:
        """How often the OOM killer struck."""
        lines = (self.path / ("memory.oom_control" if self._old else "memory.events")).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def wrapper(self) -> tuple[str, ...]:
        """A command that moves itself here and becomes another."""
        return ("sh", "-c", f'echo $$ > {self.path}/cgroup.procs; exec "$@"', "sh")


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Cgroup]:
    """A new cgroup of the version that controls memory here."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    old = (first / "memory.limit_in_bytes").exists()
    if not old and "memory" not in (second / "cgroup.subtree_control").read_text().split():
        pytest.skip("no memory cgroup controller")
    with leftovers.directory(first if old else second) as path:
        yield Cgroup(path, limit)
