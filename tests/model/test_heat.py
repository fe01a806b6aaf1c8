# SPDX-License-Identifier: BSD-3-Clause
"""How long ago pages were used: the generations in the index words."""

from __future__ import annotations

import pytest

from tests.model.rig import Rig
from tests.support.content import PAGE, compressible
from tests.support.index import Kind, words
from tmemd.store.poolfile import GENERATIONS

ANCIENT = GENERATIONS - 1


def write(rig: Rig, pages: range, version: int = 1) -> None:
    """Write pages one by one."""
    for page in pages:
        rig.write(page * PAGE, compressible(page, version))


def generations(rig: Rig, pages: range) -> set[int]:
    """In which generations these pages were used last."""
    return {words(rig.pool)[page].generation for page in pages}


def age(rig: Rig, times: int) -> None:
    """Let generations pass."""
    for _ in range(times):
        rig.device.begin_generation()


IN_TMEM, IN_FILE = range(200, 300), range(300, 400)


def fill(rig: Rig) -> None:
    """Some pages in tmem, some in the file."""
    write(rig, IN_TMEM)
    rig.frozen(True)
    write(rig, IN_FILE)
    rig.frozen(False)
    kinds = [word.kind for word in words(rig.pool)]
    assert set(kinds[IN_TMEM.start : IN_TMEM.stop]) == {Kind.TMEM}
    assert set(kinds[IN_FILE.start : IN_FILE.stop]) == {Kind.FILE}


@pytest.mark.parametrize("pages", [IN_TMEM, IN_FILE], ids=["tmem", "file"])
def test_what_is_not_used_becomes_ancient_once_and_is_never_touched_again(rig: Rig, pages: range) -> None:
    fill(rig)
    first = generations(rig, pages)
    assert len(first) == 1
    assert first != {0}
    age(rig, ANCIENT - 1)
    assert generations(rig, pages) == first
    age(rig, 1)
    assert generations(rig, pages) == {0}
    for _ in range(2 * GENERATIONS):
        age(rig, 1)
        assert generations(rig, pages) == {0}


def test_a_generation_is_never_0_and_its_number_comes_back_after_all_others(rig: Rig) -> None:
    seen: list[int] = []
    for version in range(2 * ANCIENT):
        write(rig, range(200, 201), version)
        seen += generations(rig, range(200, 201))
        age(rig, 1)
    assert sorted(seen[:ANCIENT]) == list(range(1, GENERATIONS))
    assert seen[:ANCIENT] == seen[ANCIENT:]


def test_reading_an_ancient_page_makes_it_young(rig: Rig) -> None:
    write(rig, range(200, 202))
    age(rig, ANCIENT)
    assert rig.read(200 * PAGE, PAGE) == compressible(200, 1)
    write(rig, range(202, 203))
    assert generations(rig, range(200, 201)) == generations(rig, range(202, 203))
    assert generations(rig, range(201, 202)) == {0}


@pytest.mark.parametrize("times", [1, 7, ANCIENT, 3 * GENERATIONS])
def test_demotion_takes_the_page_that_was_not_used_for_longest(rig: Rig, times: int) -> None:
    write(rig, range(300, 301))
    age(rig, times)
    write(rig, range(200, 250))
    write(rig, range(301, 310))
    assert rig.device.demote(1) > 0
    kinds = [word.kind for word in words(rig.pool)]
    assert [page for page in range(200, 310) if kinds[page] is Kind.FILE] == [300]
