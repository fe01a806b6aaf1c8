# SPDX-License-Identifier: BSD-3-Clause
"""The device as it should be: a dict of pages, and nothing clever."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.content import PAGE

ZEROS = bytes(PAGE)


class Reference:
    """What a device of *size* bytes holds; pages not in `pages` are zeros."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, bytes] = {}

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The request cut at page borders: page number, and first and last byte within it."""
        end = offset + length
        while offset < end:
            first = offset % PAGE
            last = min(PAGE, first + end - offset)
            yield offset // PAGE, first, last
            offset += last - first

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at *offset*."""
        return b"".join(self.pages.get(n, ZEROS)[first:last] for n, first, last in self._pieces(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Replace the bytes at *offset*."""
        for n, first, last in self._pieces(offset, len(data)):
            piece, data = data[: last - first], data[last - first :]
            old = self.pages.get(n, ZEROS)
            self.pages[n] = old[:first] + piece + old[last:]
            if self.pages[n] == ZEROS:
                del self.pages[n]

    def zero(self, offset: int, length: int) -> None:
        """Zero the bytes at *offset*."""
        self.write(offset, bytes(length))

    def whole(self) -> bytes:
        """All of the device."""
        return self.read(0, self.size)
