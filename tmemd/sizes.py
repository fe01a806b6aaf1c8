# SPDX-License-Identifier: BSD-3-Clause
"""Sizes in bytes as people write them: nbdkit's notation, powers of 1024, and fractions of these."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction
from typing import Final

_UNITS: Final = {"": 1, "b": 1, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"(\d{1,19}(?:\.\d{1,9}(?=[kmgt]))?)([a-z]?)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes meant by '4096', '512M', '1.5G', '16s' (sectors of 512), rounded down. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write a number of bytes, or one with K, M, G or T")
    size = int(Fraction(match[1]) * _UNITS[match[2]])
    if size > 1 << 62:
        raise ValueError(f"{text!r} is too large for a size")
    return size


def format_size(size: int) -> str:
    """A size for people, to three digits: '1.50G'."""
    if size < 1000:
        return str(size)
    units = iter("KMGT")
    value, unit = size / 1024, next(units)
    while value >= 1000 and unit != "T":
        value, unit = value / 1024, next(units)
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"


def size_argument(text: str) -> int:
    """A size on an argparse command line."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
