# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest

from tmemd.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("8g", 8 << 30), ("3s", 1536), (" 1K ", 1024)]
)
def test_sizes_are_read_as_nbdkit_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1.50G", "25.0K", "9.99M", "9216T", "999"])
def test_sizes_are_read_as_they_are_printed(text: str) -> None:
    assert format_size(parse_size(text)) == text


@pytest.mark.parametrize(
    "text", ["", "-1", "1.5", "1.5s", "1.G", ".5G", "G", "1GB", "0x10", "1 G", "9999999T", "٣", "1e3"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1024, "1.00K"),
        (1 << 20, "1.00M"),
        (300 << 20, "300M"),
        (25 << 30, "25.0G"),
        (9 << 50, "9216T"),
    ],
)
def test_sizes_are_written_short(size: int, text: str) -> None:
    assert format_size(size) == text
