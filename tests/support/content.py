# SPDX-License-Identifier: BSD-3-Clause
"""Page contents that tell where they belong: a page and a version always give the same 4096 bytes."""

from __future__ import annotations

import random
import struct
import zlib

PAGE = 4096

_NOISE = random.Random(1).randbytes(1 << 16)
_TEXT = b" ".join(b"%d bottles of beer on wall %d" % (n, n * 7919 % 1000) for n in range(4000))[: 1 << 16]
_STAMP = struct.Struct("<QQ")


def content(page: int, version: int) -> bytes:
    """What *page* holds after its write number *version*; version 0 is a page never written.

    About one page in eight is zeros, one in eight repeats a word, one in eight does not compress; the rest compress to
    sizes spread over the whole range, so that a rewrite seldom fits where the page was before.
    """
    mix = zlib.crc32(_STAMP.pack(page, version))
    kind, place = mix % 8, (mix >> 3) % (1 << 15)
    if version == 0 or kind == 0:
        return bytes(PAGE)
    stamp = _STAMP.pack(page, version)
    if kind == 1:
        return struct.pack("<II", page, version) * (PAGE // 8)
    noise = PAGE if kind == 2 else mix >> 3 & 0xBFF
    return (stamp + _NOISE[place : place + noise] + _TEXT[place : place + PAGE])[:PAGE]


def incompressible(page: int, version: int) -> bytes:
    """A page LZ4 cannot shrink."""
    place = zlib.crc32(_STAMP.pack(page, version)) % (1 << 15)
    return _STAMP.pack(page, version) + _NOISE[place : place + PAGE - _STAMP.size]


def compressible(page: int, version: int) -> bytes:
    """A page LZ4 shrinks to about a third."""
    place = zlib.crc32(_STAMP.pack(page, version)) % (1 << 15)
    return _STAMP.pack(page, version) + _TEXT[place : place + PAGE - _STAMP.size]
