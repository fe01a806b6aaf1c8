# SPDX-License-Identifier: BSD-3-Clause
"""The reference itself, on the cases that are easy to get wrong."""

from __future__ import annotations

from tests.support.content import PAGE
from tests.support.reference import Reference


def test_reads_zeros_where_nothing_was_written() -> None:
    assert Reference(3 * PAGE).whole() == bytes(3 * PAGE)


def test_write_across_a_page_border_changes_nothing_else() -> None:
    reference = Reference(3 * PAGE)
    reference.write(0, b"a" * 3 * PAGE)
    reference.write(PAGE - 1, b"bcd")
    assert reference.whole() == b"a" * (PAGE - 1) + b"bcd" + b"a" * (2 * PAGE - 2)


def test_zeroing_forgets_whole_pages() -> None:
    reference = Reference(3 * PAGE)
    reference.write(0, b"a" * 3 * PAGE)
    reference.zero(PAGE, PAGE)
    reference.zero(2 * PAGE, 1)
    assert sorted(reference.pages) == [0, 2]
    assert reference.read(2 * PAGE, 2) == b"\0a"


def test_length_of_the_last_piece_of_a_device_not_a_whole_number_of_pages() -> None:
    reference = Reference(PAGE + 512)
    reference.write(PAGE + 510, b"zz")
    assert reference.whole()[-3:] == b"\0zz"
    assert len(reference.whole()) == PAGE + 512
