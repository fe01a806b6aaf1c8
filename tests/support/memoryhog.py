# SPDX-License-Identifier: BSD-3-Clause
"""A process that takes RAM and gives it back, as it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.leftovers import dying_with_us

_PROGRAM = """
import mmap, sys
CHUNK = 16 << 20
held = []
for line in sys.stdin:
    wanted = int(line) // CHUNK
    while len(held) > wanted:
        held.pop().close()
    while len(held) < wanted:
        part = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        part.write(b"x" * CHUNK)
        held.append(part)
    print(flush=True)
"""


class MemoryHog:
    """Use it in a with block; what it holds is gone behind it."""

    def __init__(self, wrapper: tuple[str, ...] = ()) -> None:
        command = dying_with_us([*wrapper, sys.executable, "-c", _PROGRAM])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # Should the machine run out of memory, it is to be this process that goes.
        Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def __enter__(self) -> MemoryHog:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def hold(self, nbytes: int) -> None:
        """Hold so many bytes (to 16 MiB) from now on; returns when it does."""
        assert self._process.stdin
        assert self._process.stdout
        print(nbytes, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline(), "the hog was killed"
