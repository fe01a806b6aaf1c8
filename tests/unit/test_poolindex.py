# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
import os
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import fakes
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import open_device
from tmemd.store import poolindex
from tmemd.store.poolfile import PAGE, Identity, PoolError
from tmemd.store.poolindex import Kind, is_read_by_blkid

MIB = fakes.MIB


def kinds(filler: fakes.Filler) -> list[Kind]:
    """One for each page, and the promises that runs make."""
    runs = list(poolindex.runs(filler.fd, filler.identity))
    assert [run.start for run in runs] == list(itertools.accumulate([run.count for run in runs], initial=0))[:-1]
    assert all(one.kind != other.kind for one, other in itertools.pairwise(runs))
    return [run.kind for run in runs for _ in range(run.count)]


def test_an_empty_pool_is_one_run_and_reading_it_allocates_nothing(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        before = os.fstat(filler.fd).st_blocks
        assert kinds(filler) == [Kind.NOWHERE] * filler.identity.pages
        assert os.fstat(filler.fd).st_blocks == before


def test_words_and_states_are_read_together(directory: Path) -> None:
    with fakes.filled(directory, size=10 * MIB - 512) as filler:
        expected = [Kind.NOWHERE] * filler.identity.pages
        filler.state(0, 2)
        expected[:512] = [Kind.LOST] * 512
        for page, kind in ((512, 1), (513, 2), (515, 3), (1023, 4), (filler.identity.pages - 1, 1)):
            filler.word(page, kind)
            expected[page] = Kind(kind)
        filler.state(2, 1)
        filler.word(1024, 4)  # means nothing under that state
        expected[1024:1536] = [Kind.FILE] * 512
        filler.state(3, 3)
        expected[1536:2048] = [Kind.ZERO] * 512
        assert kinds(filler) == expected


def test_many_blocks_in_use_are_read_in_pieces(directory: Path) -> None:
    with fakes.filled(directory, size=300 * MIB) as filler:
        expected = [Kind(page % 3) for page in range(filler.identity.pages)]
        words = b"".join(bytes([kind, 9, 9, 9, 9, 9, 9, 9]) if kind else bytes(8) for kind in expected)
        os.pwrite(filler.fd, words, filler.identity.index_offset)
        assert kinds(filler) == expected


def test_a_tebibyte_without_pages_is_read_at_once(directory: Path) -> None:
    with fakes.filled(directory, size=1 << 40) as filler:
        filler.word((1 << 28) - 1, 1)
        runs = list(poolindex.runs(filler.fd, filler.identity))
        assert [(run.count, run.kind) for run in runs] == [((1 << 28) - 1, Kind.NOWHERE), (1, Kind.TMEM)]


@pytest.mark.parametrize("word", [6, 7, (1 << 64) - 1])
def test_words_of_no_kind_are_as_good_as_lost(directory: Path, word: int) -> None:
    with fakes.filled(directory) as filler:
        filler.word(7, word)
        filler.state(5, 77)
        found = kinds(filler)
        assert found[7] is found[5 * 512] is Kind.LOST
        assert found.count(Kind.LOST) == 513


def test_a_truncated_pool_reads_as_nowhere(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        os.ftruncate(filler.fd, filler.identity.index_offset)
        assert set(kinds(filler)) == {Kind.NOWHERE}


@pytest.mark.parametrize(
    "change",
    [
        {"size": 1 << 62},
        {"index_offset": 4096 * 4},
        {"index_offset": 20481},
        {"data_offset": 1 << 63},
        {"data_offset": 262145},
        {"data_bytes": 0},
        {"data_bytes": 1 << 50},
    ],
)
def test_layouts_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    good = fakes.identity("web")
    poolindex.check_layout(good, "web")
    values = {field: getattr(good, field) for field in Identity.__dataclass_fields__}
    with pytest.raises(PoolError, match="cannot lie"):
        poolindex.check_layout(Identity(**(values | change)), "web")


def test_pages_that_blkid_reads_are_in_the_file_at_once(pools: Path, disk: Path) -> None:
    size = 16 * MIB
    with closing(open_device(DeviceConfig("web", size, disk, 16 * MIB, pools, reserve=False))) as served:
        for page in range(size // PAGE):
            _core.pwrite(served.core, b"x" * PAGE, page * PAGE, 0)
        content = disk.read_bytes()
    pages = size // PAGE
    for page in range(pages):
        assert (content[page * PAGE] != 0) == is_read_by_blkid(page, pages), page
