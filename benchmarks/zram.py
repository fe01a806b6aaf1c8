# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's own zram, as the yardstick for density."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PAGE: Final = 4096
CONTROL: Final = Path("/sys/class/zram-control")
_BLKDISCARD: Final = 0x1277


@dataclass(frozen=True)
class Usage:
    """What a zram device holds and takes, in bytes (mm_stat's compr_data_size and mem_used_total)."""

    compressed: int
    used: int


class Zram:
    """A zram device of its own, written to with O_DIRECT."""

    def __init__(self, number: int, size: int) -> None:
        """Give device *number* the lz4 compressor and *size* bytes, and open it."""
        self._sys = Path(f"/sys/block/zram{number}")
        (self._sys / "comp_algorithm").write_text("lz4")
        (self._sys / "disksize").write_text(str(size))
        self._fd = os.open(f"/dev/zram{number}", os.O_RDWR | os.O_DIRECT)

    def close(self) -> None:
        """Close the descriptor; the device itself is removed by whoever added it."""
        os.close(self._fd)

    def write(self, corpus: mmap.mmap, page: int, content: int) -> None:
        """Write page *content* of the corpus at *page*."""
        with memoryview(corpus) as view:
            os.pwrite(self._fd, view[content * PAGE : (content + 1) * PAGE], page * PAGE)

    def write_all(self, corpus: mmap.mmap, trace: Sequence[tuple[int, int]]) -> None:
        """Write each (page, content) in turn."""
        for page, content in trace:
            self.write(corpus, page, content)

    def discard(self, page: int) -> None:
        """Forget a page."""
        fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", page * PAGE, PAGE))

    def compact(self) -> None:
        """Have zsmalloc compact its memory now."""
        (self._sys / "compact").write_text("1")

    def usage(self) -> Usage:
        """What it takes now."""
        fields = (self._sys / "mm_stat").read_text().split()
        return Usage(int(fields[1]), int(fields[2]))


@contextlib.contextmanager
def device(size: int) -> Iterator[Zram]:
    """A new zram device of *size* bytes, removed afterwards. Needs root."""
    number = int((CONTROL / "hot_add").read_text())
    try:
        zram = Zram(number, size)
        try:
            yield zram
        finally:
            zram.close()
    finally:
        remove(number)


def remove(number: int) -> None:
    """Remove a device; udev may still be looking at it for a moment."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            (CONTROL / "hot_remove").write_text(str(number))
            return
        time.sleep(0.1)
    raise RuntimeError(f"cannot remove zram{number}: somebody uses it")
