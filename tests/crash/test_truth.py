# SPDX-License-Identifier: BSD-3-Clause
"""The judge of the crash tests: what must not be is told from what may be."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.history import Act, Step
from tests.crash.replay import SECTOR, Entry, Operation
from tests.crash.setting import Setting
from tests.crash.truth import Kind, Truth
from tests.support.content import PAGE, compressible

THROUGH, OTHER = 0, 8192  # pages: written through, and not
ZEROS = bytes(PAGE)
FLUSH, DRAIN = Step(Act.FLUSH), Step(Act.DRAIN)
FILE = Path("/files/backing")


def one(version: int, page: int = OTHER) -> bytes:
    """A page's content."""
    return compressible(page, version)


def write(version: int, page: int = OTHER, *, fua: bool = False) -> Step:
    """Write a page."""
    return Step(Act.WRITE, page * PAGE, PAGE, one(version, page), fua)


def torn(new: bytes, old: bytes) -> bytes:
    """A page whose first sectors are new."""
    return new[: 3 * SECTOR] + old[3 * SECTOR :]


def mark(number: int, error: int = 0) -> Entry:
    """A step ended."""
    return Entry(Operation.MARK, Path(), number, error, b"")


def on_file(operation: Operation, page: int = OTHER, file: Path = FILE) -> Entry:
    """Something happened to a page in the file."""
    return Entry(operation, file, page * PAGE, PAGE, b"")


def find(truth: Truth, got: bytes | None, page: int = OTHER) -> None:
    """A page is read."""
    truth.follow(Entry(Operation.FOUND, Path(), page, PAGE, got or b""))


def lived(*steps: Step, durable: bool = False, lost_zero: bool = False, ended: bool = True) -> Truth:
    """After these steps, the last of which may be under way still."""
    truth = Truth(Setting(durable=durable, lost_zero=lost_zero))
    truth.begin(list(steps))
    for number in range(len(steps) + ended):
        truth.follow(mark(number))
    return truth


def failed(truth: Truth, step: Step) -> Truth:
    """The same after one more step that failed, because of a failure elsewhere."""
    truth.follow(Entry(Operation.SYNC_FAILED, Path("/files/backing.map"), 0, 0, b""))
    truth.begin([step])
    truth.follow(mark(0))
    truth.follow(mark(1, errno.EIO))
    return truth


@pytest.mark.parametrize("got", [one(1), ZEROS, torn(one(2), one(1)), None], ids=["old", "zeros", "torn", "EIO"])
def test_while_the_pool_lives_only_the_newest_is_right(got: bytes | None) -> None:
    truth = lived(write(1), write(2))
    find(truth, one(2))
    with pytest.raises(AssertionError, match="page 8192 was read as"):
        find(truth, got)


def test_a_step_that_failed_or_was_killed_leaves_each_page_old_or_new() -> None:
    for got in (one(1), one(2), None):
        find(failed(lived(write(1)), write(2)), got)
    for got in (one(1), one(2)):
        truth = lived(write(1), write(2), ended=False)
        truth.end()
        find(truth, got)
    for wrong in (ZEROS, torn(one(2), one(1))):
        with pytest.raises(AssertionError):
            find(failed(lived(write(1)), write(2)), wrong)
    with pytest.raises(AssertionError):
        find(truth, None)


def test_what_was_read_once_does_not_change_back() -> None:
    truth = failed(lived(write(1)), write(2))
    find(truth, one(2))
    with pytest.raises(AssertionError):
        find(truth, one(1))


def test_no_step_fails_without_a_cause() -> None:
    truth = lived(write(1), ended=False)
    with pytest.raises(AssertionError, match="nothing was made to fail"):
        truth.follow(mark(1, errno.EIO))


def test_a_failed_sync_concerns_what_was_written_since_the_last_one() -> None:
    truth = lived(write(1), write(1, THROUGH))
    for entry in (Operation.WRITE, Operation.SYNC):
        truth.follow(on_file(entry))
    truth.follow(on_file(Operation.WRITE, THROUGH))
    truth.follow(on_file(Operation.SYNC_FAILED))
    find(truth, None, THROUGH)
    with pytest.raises(AssertionError):
        find(truth, None)


def test_a_torn_write_concerns_its_pages_until_they_are_written() -> None:
    truth = lived(write(1), write(1, OTHER + 1), write(2), ended=False)
    truth.follow(on_file(Operation.TORN))
    find(truth, None)
    with pytest.raises(AssertionError):
        find(truth, None, OTHER + 1)
    truth.follow(mark(3))
    with pytest.raises(AssertionError):
        find(truth, None)


def test_what_a_server_failed_to_sync_it_may_forget_after_this_host_has_died() -> None:
    truth = Truth(Setting(far=True, durable=True))
    truth.begin([write(1), write(2)])
    for entry in (mark(0), on_file(Operation.WRITE), on_file(Operation.SYNC), mark(1), on_file(Operation.WRITE)):
        truth.follow(entry)
    truth.follow(on_file(Operation.SYNC_FAILED))
    truth.follow(mark(2, errno.EIO))
    truth.host_dies(server_too=False)
    for got in (one(2), one(1), None):
        find(truth, got)
    assert truth.after_death(OTHER, one(1)) is Kind.NEWEST


@pytest.mark.parametrize("killed", [False, True])
def test_a_change_that_comes_true_late_is_an_error_where_its_process_was_killed(killed: bool) -> None:
    truth = Truth(Setting(far=True, durable=True))
    truth.begin([write(2)])
    for entry in (mark(0), on_file(Operation.HELD)):
        truth.follow(entry)
    if killed:
        truth.end()
        truth.begin([write(3)])
        truth.follow(mark(0))
    for entry in (on_file(Operation.LATE), replace(on_file(Operation.WRITE), data=one(2)), mark(1)):
        truth.follow(entry)
    find(truth, one(3 if killed else 2))
    if killed:
        find(truth, None)
        truth.begin([Step(Act.TRIM, OTHER * PAGE, PAGE, bytes(PAGE), fua=True)])
        for entry in (mark(0), mark(1)):
            truth.follow(entry)
        assert [truth.after_death(OTHER, got) for got in (ZEROS, one(2), one(3))] == [N, N, W]
    else:
        with pytest.raises(AssertionError):
            find(truth, None)


def test_part_of_a_source_s_page_that_may_be_a_mixture_leaves_a_mixture() -> None:
    truth, half = Truth(Setting(far=True, source=True)), PAGE // 2
    truth.begin([write(1), Step(Act.FLUSH), write(2), Step(Act.PART, OTHER * PAGE + half, half, bytes(half), True)])
    for entry in (mark(0), mark(1), mark(2), on_file(Operation.WRITE), mark(3), on_file(Operation.FORGOT), mark(4)):
        truth.follow(entry)
    find(truth, torn(one(2), one(1))[:half].ljust(PAGE, b"\0"))
    with pytest.raises(AssertionError):
        find(truth, torn(one(2), one(1)))


def test_what_needs_room_fails_while_the_disk_is_full() -> None:
    truth = Truth(Setting())
    truth.begin([Step(Act.DISK_FULL), write(1), Step(Act.DISK_FREED), write(2)])
    for entry in (mark(0), mark(1), mark(2, errno.EIO), mark(3)):
        truth.follow(entry)
    with pytest.raises(AssertionError, match="nothing was made to fail"):
        truth.follow(mark(4, errno.EIO))


N, U, T, L, W = Kind.NEWEST, Kind.UNFLUSHED, Kind.TORN, Kind.LOST, Kind.WRONG


@pytest.mark.parametrize(
    ("truth", "page", "kinds"),
    # What it is if the host dies and the page is found new, old, torn, zeros, lost.
    [
        (lived(write(1), write(2)), OTHER, (N, W, W, W, L)),
        (lived(write(1), write(2), ended=False), OTHER, (N, N, W, W, L)),
        (lived(write(1), write(2), DRAIN), OTHER, (N, W, W, W, W)),
        (lived(write(2), DRAIN, write(1, OTHER + 1), ended=False), OTHER, (N, W, W, W, L)),
        (failed(lived(write(1)), write(2)), OTHER, (N, N, W, W, L)),
        (lived(write(1), write(2), lost_zero=True), OTHER, (N, W, W, L, W)),
        (lived(write(1, THROUGH), write(2, THROUGH)), THROUGH, (N, W, W, W, W)),
        (lived(write(1, THROUGH), write(2, THROUGH), ended=False), THROUGH, (N, N, T, W, W)),
        (lived(write(1), FLUSH, write(2), durable=True), OTHER, (N, U, T, W, W)),
        (lived(write(1), write(2), FLUSH, durable=True), OTHER, (N, W, W, W, W)),
        (lived(write(1), write(2), FLUSH, durable=True, ended=False), OTHER, (N, U, T, U, W)),
        (lived(write(1), write(2, fua=True), durable=True), OTHER, (N, W, W, W, W)),
        (lived(write(1), write(2), write(1, OTHER + 1, fua=True), durable=True), OTHER, (N, U, T, U, W)),
        (failed(lived(write(1), FLUSH, write(2), durable=True), FLUSH), OTHER, (N, U, T, W, W)),
        (failed(lived(write(1), FLUSH, durable=True), write(2, fua=True)), OTHER, (N, N, T, W, L)),
    ],
)
def test_what_the_host_s_death_may_leave(truth: Truth, page: int, kinds: tuple[Kind, ...]) -> None:
    new, old = one(2, page), one(1, page)
    finds = (new, old, torn(new, old), ZEROS, None)
    assert tuple(truth.after_death(page, got) for got in finds) == kinds


def test_what_was_found_after_the_host_s_death_is_the_truth_from_then_on() -> None:
    truth = lived(write(1), FLUSH, write(2), durable=True)
    truth.host_dies()
    assert truth.must_look
    mixed = torn(one(2), one(1))
    find(truth, mixed)
    with pytest.raises(AssertionError):
        find(truth, one(2))
    assert truth.after_death(OTHER, one(1)) is Kind.WRONG
    assert truth.after_death(OTHER, mixed) is Kind.NEWEST


def test_what_was_drained_is_not_lost_unless_the_map_says_so_of_a_neighbour() -> None:
    truth = lived(write(1))
    truth.host_dies()
    find(truth, None)
    truth.begin([write(2), DRAIN])
    for number in range(3):
        truth.follow(mark(number))
    assert truth.after_death(OTHER, None) is Kind.LOST


def test_part_of_a_page_that_is_lost_cannot_be_written() -> None:
    part = Step(Act.PART, OTHER * PAGE + 100, 4, b"part")
    for error in (errno.EIO, 0):
        truth = lived(write(1))
        truth.host_dies()
        find(truth, None)
        truth.begin([part])
        truth.follow(mark(0))
        truth.follow(mark(1, error))
    with pytest.raises(AssertionError):
        find(truth, (bytes(100) + b"part").ljust(PAGE, b"\0"))
