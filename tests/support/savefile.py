# SPDX-License-Identifier: BSD-3-Clause
"""A reader of save files written from docs/save-format.md alone, in pure Python, independent of the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lz4.block
from crc32c import crc32c

from tests.support.content import PAGE

RAW, LZ4, SAME, ZERO, FILE, UNVERIFIED, LOST, END = 0, 1, 2, 16, 17, 18, 19, 32


@dataclass(frozen=True)
class Record:
    """One record, and where in the file it begins."""

    at: int
    page: int
    encoding: int
    payload: bytes

    def content(self) -> bytes:
        """Of the page."""
        if self.encoding == LZ4:
            return bytes(lz4.block.decompress(self.payload, uncompressed_size=PAGE))
        return self.payload if self.encoding == RAW else self.payload * (PAGE // 8)

    @property
    def pages(self) -> range:
        """Those it speaks of."""
        if self.encoding == FILE:
            return range(self.page, self.page + len(self.payload) // 4)
        count = 1 if self.encoding <= SAME else int.from_bytes(self.payload, "little")
        return range(self.page, self.page + count)


def header(data: bytes) -> tuple[dict[str, Any], int]:
    """The description, and where the first record begins."""
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"TMEMSAVE", 1)
    end = 16 + length
    assert struct.unpack_from("<I", data, end)[0] == crc32c(data[:end])
    return json.loads(data[16:end]), end + 4


def records(data: bytes) -> Iterator[Record]:
    """All but the last one, which is checked, too."""
    at = begin = header(data)[1]
    counted = pages = lost = 0
    while True:
        page, crc, length, encoding = struct.unpack_from("<IIHH", data, at)
        payload = data[at + 12 : at + 12 + length]
        assert crc == crc32c(struct.pack("<IHH", page, length, encoding) + payload)
        if encoding == END:
            break
        record = Record(at, page, encoding, payload)
        yield record
        counted, at = counted + 1, at + 12 + length
        pages += encoding <= SAME
        lost += len(record.pages) if encoding == LOST else 0
    assert begin <= at == len(data) - 12 - 28
    assert struct.unpack("<QQQI", payload) == (counted, pages, lost, crc32c(data[:at]))
