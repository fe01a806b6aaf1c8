# SPDX-License-Identifier: BSD-3-Clause
"""What was promised of single pages, kept over a kill, a failed sync, a torn write or the host's death."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.crash.history import PAGES, SIZE, Act, Step, zero
from tests.crash.replay import SECTOR, Entry, Operation
from tests.crash.setting import BACKING, OVERFLOW, Setting
from tests.crash.truth import Kind
from tests.crash.world import World
from tests.support.content import PAGE, compressible
from tmemd.store import poolfile

ANY = 8184  # a page like most, near the end of its region
FIRST = 0  # a page that is written through
BORDER = SIZE // PAGE - 128  # from here on all are; before it none
MANY = 16  # outcomes of each host death: what may be missing has been missing


def write(page: int, version: int, count: int = 1) -> Step:
    """Write *count* pages that compress, from *page* on."""
    data = b"".join(compressible(n, version) for n in range(page, page + count))
    return Step(Act.WRITE, page * PAGE, len(data), data)


def read(page: int, count: int = 1) -> Step:
    """Read *count* pages from *page* on, each by itself."""
    return Step(Act.READ, page * PAGE, count * PAGE)


def _is_counted(entry: Entry) -> bool:
    """Whether it is an operation to recorder.c: not what a driver or a world noted, nor what changed in a mapping."""
    is_mapped = entry.operation is Operation.WRITE and entry.path.name == OVERFLOW and entry.length == SECTOR
    is_noted = {Operation.FOUND, Operation.AWAY, Operation.BACK, Operation.FORGOT}
    return entry.operation not in is_noted and not is_mapped


class Scene:
    """A world in which faults can be aimed at a step."""

    def __init__(self, base: Path, setting: Setting) -> None:
        self._base, self._setting = base, setting
        self._worlds: list[World] = []

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds:
            world.close()

    def world(self, samples: int = MANY) -> World:
        """A new one."""
        base = self._base / str(len(self._worlds))
        base.mkdir()
        self._worlds.append(World(base, 1, self._setting, samples=samples))
        return self._worlds[-1]

    def number_of(self, operation: Operation, file: str, step: int, *lives: list[Step]) -> int:
        """Of the last of these lives: which operation is the first such one on *file* in its *step* (from 1 on).

        Those of a server are counted by themselves.
        """
        rehearsal = self.world(samples=0)
        for steps in lives[:-1]:
            rehearsal.live(steps, of_server="")
            rehearsal.host_dies()
        rehearsal.live(lives[-1], of_server="")
        number = done = 0
        for entry in rehearsal.entries:
            if entry.operation is Operation.MARK:
                done = entry.offset
            elif _is_counted(entry) and self._is_server(entry.path.name) == self._is_server(file):
                if (entry.operation, entry.path.name, done) == (operation, file, step - 1):
                    return number
                number += 1
        raise AssertionError(f"no {operation.name} of {file} in step {step}")

    def _is_server(self, name: str) -> bool:
        return self._setting.far and name in (BACKING, "nbdkit")


@pytest.fixture(params=["core", pytest.param("virtio", marks=pytest.mark.slow)])
def vhost(request: pytest.FixtureRequest) -> bool:
    """Whether requests come by the virtio door."""
    return bool(request.param == "virtio")


@pytest.fixture
def write_back(pools: Path, vhost: bool) -> Iterator[Scene]:
    """Of a device that acknowledges FLUSH at once."""
    with Scene(pools, Setting(vhost=vhost)) as scene:
        yield scene


@pytest.fixture
def durable(pools: Path, vhost: bool) -> Iterator[Scene]:
    """Of a device that makes durable what FLUSH acknowledges."""
    with Scene(pools, Setting(durable=True, vhost=vhost)) as scene:
        yield scene


@pytest.fixture
def cache(pools: Path, vhost: bool) -> Iterator[Scene]:
    """Of a device that is a source, which it changes."""
    with Scene(pools, Setting(source=True, vhost=vhost)) as scene:
        yield scene


@pytest.fixture
def far(pools: Path) -> Iterator[Scene]:
    """Of a device that acknowledges FLUSH at once, and whose file a server has."""
    with Scene(pools, Setting(far=True)) as scene:
        yield scene


FLUSH, DRAIN, DEMOTE, FREEZE = (Step(act) for act in (Act.FLUSH, Act.DRAIN, Act.DEMOTE, Act.FREEZE))


def test_a_bit_of_the_bitmap_that_was_not_synced_is_not_trusted_after_a_kill(write_back: Scene) -> None:
    steps = [write(ANY, 1), DRAIN, write(ANY, 2)]
    bit = write_back.number_of(Operation.WRITE, "backing.map", 3, steps)
    world = write_back.world()
    world.live(steps, f"{bit}a")
    world.live([write(ANY, 3)])
    assert min(world.found[Kind.NEWEST], world.found[Kind.LOST]) > MANY


def test_a_failed_sync_is_remembered_over_a_restart(write_back: Scene) -> None:
    steps = [write(ANY, 1), DRAIN]
    world = write_back.world()
    world.live(steps, f"{write_back.number_of(Operation.SYNC, 'backing', 2, steps)}f")
    world.live([DRAIN])
    assert world.truth.steps == {(Act.WRITE, True): 1, (Act.DRAIN, False): 2}


@pytest.mark.parametrize("is_half_made", [False, True])
def test_a_failed_sync_of_a_source_is_remembered_when_its_pool_is_made_anew(cache: Scene, is_half_made: bool) -> None:
    steps = [write(ANY, 1), FLUSH, zero(ANY), FLUSH]
    world = cache.world()
    world.live(steps, f"{cache.number_of(Operation.SYNC, BACKING, 4, steps)}f")
    if is_half_made:
        with world.pool.open("r+b") as pool:
            poolfile.unmake(pool.fileno(), poolfile.read_counters(pool.fileno(), world.pool))
    world.live([FLUSH, zero(ANY, fua=True)])
    assert world.truth.steps[Act.FLUSH, False] == 2
    world.host_dies()
    world.live([FLUSH])
    assert world.truth.steps[Act.FLUSH, True] == 2


def test_a_page_is_not_dropped_whose_copy_in_the_file_was_not_synced(durable: Scene) -> None:
    steps = [write(ANY, 1), FLUSH]
    world = durable.world(samples=0)
    world.live(steps, f"{durable.number_of(Operation.SYNC, 'backing', 2, steps)}f")
    assert world.truth.steps[Act.FLUSH, False] == 1
    for _ in range(MANY):
        world.evict()
        world.live([DEMOTE, read(ANY)])
    assert world.truth.seen == {Kind.NEWEST: MANY}


@pytest.mark.parametrize("neighbour", [write(ANY + 1, 1), zero(ANY + 1)], ids=["written", "zeroed"])
def test_what_flush_acknowledged_is_in_the_file(durable: Scene, neighbour: Step) -> None:
    world = durable.world(samples=0)
    world.live([write(ANY + 1, 2), write(ANY, 1), FLUSH, neighbour])
    world.judge(MANY)
    assert world.found[Kind.NEWEST] > MANY


def test_what_flush_acknowledged_is_in_the_file_whatever_is_written_meanwhile(durable: Scene) -> None:
    beside = write(ANY + 4, 2)
    world = durable.world(samples=0)
    world.live([write(ANY, 1, 4), Step(Act.FLUSH, beside.offset, beside.length, beside.data)])
    world.judge(MANY)
    assert world.found[Kind.NEWEST] > MANY


def test_what_fua_acknowledged_is_in_the_file(durable: Scene) -> None:
    pages = write(ANY, 1, 4)
    world = durable.world(samples=0)
    world.live([
        Step(pages.act, pages.offset, pages.length, pages.data, fua=True),
        zero(ANY, fua=True), zero(ANY + 1, act=Act.TRIM, fua=True), write(ANY + 4, 1),
    ])  # fmt: skip
    world.judge(MANY)
    assert world.found[Kind.NEWEST] > MANY


def test_a_failed_zeroing_leaves_no_mixture(write_back: Scene) -> None:
    pages = range(FIRST, FIRST + 8)
    steps = [write(FIRST, 1, len(pages)), DRAIN, write(FIRST + 8, 1)]
    steps += [step for page in pages for step in (zero(page), read(page))]
    first = write_back.number_of(Operation.PUNCH, "backing", 4, steps)
    world = write_back.world()
    world.live(steps, " ".join(f"{first + n}f" for n in range(2 * len(pages))))  # another way to zero is tried, too
    assert world.truth.steps[Act.ZERO, False] == len(pages)
    assert world.truth.seen.total() == len(pages)


@pytest.mark.parametrize("page", [FIRST, ANY])
def test_a_failed_overwrite_leaves_no_mixture(write_back: Scene, page: int) -> None:
    before, steps = [write(page, 1, 8), DRAIN], [FREEZE, write(page, 2, 8), read(page, 8)]
    world = write_back.world()
    world.live(before)
    world.host_dies()  # which leaves no checksums
    world.live(steps, f"{write_back.number_of(Operation.WRITE, 'backing', 2, before, steps)}f")
    assert world.truth.steps[Act.WRITE, False] == 1
    assert world.truth.seen[Kind.NEWEST] + world.truth.seen[Kind.LOST] > 8


def test_a_failed_overwrite_is_not_taken_to_be_in_the_file_by_a_drain(write_back: Scene) -> None:
    steps = [write(ANY, 1, 8), DRAIN, FREEZE, write(ANY, 2, 8), DRAIN]
    world = write_back.world()
    world.live(steps, f"{write_back.number_of(Operation.WRITE, 'backing', 4, steps)}f")
    assert world.truth.steps[Act.WRITE, False] == 1


def test_zeros_are_not_acknowledged_that_a_failed_sync_may_have_lost(write_back: Scene) -> None:
    steps = [write(ANY, 1), DRAIN, write(FIRST, 1), DRAIN, zero(FIRST)]
    world = write_back.world()
    world.live(steps, f"{write_back.number_of(Operation.SYNC, 'backing', 2, steps)}f")
    assert world.truth.steps[Act.WRITE, False] == 1


def test_a_first_start_that_is_killed_anywhere_keeps_no_later_one_from_starting(pools: Path) -> None:
    """Killed before each operation on the disk until one start has come through; each time a later one does."""
    for number in range(100):
        base = pools / str(number)
        base.mkdir()
        world = World(base, 1, samples=0)
        left = world.live([write(ANY, 1)], f"{number}b")
        assert world.live([write(ANY, 2), read(ANY)]) == []
        if not left:
            break
    assert number > 3


def test_what_a_killed_process_left_unsynced_with_a_server_is_synced_by_a_drain(far: Scene) -> None:
    world = far.world(samples=0)
    world.live([DRAIN, write(ANY, 1, 8), DEMOTE], of_server="")
    world.live([DRAIN], of_server="")
    world.judge(MANY)
    assert world.found[Kind.NEWEST] == MANY * len(PAGES)


def test_what_a_server_failed_to_sync_for_another_page_is_not_taken_to_be_in_the_file(far: Scene) -> None:
    steps = [write(ANY, 1, 8), DRAIN, write(ANY, 2, 8), DEMOTE, write(FIRST, 1)]
    world = far.world()
    world.live(steps, of_server=f"{far.number_of(Operation.SYNC, BACKING, 5, steps)}f")
    world.live([DRAIN], of_server="")
    assert world.truth.steps[Act.DRAIN, False] == 1


def test_a_durable_device_flushes_on_when_a_server_without_fua_is_back(pools: Path) -> None:
    steps = [write(ANY, 1), Step(Act.SERVER_GOES), Step(Act.SERVER_COMES), write(ANY, 2), FLUSH]
    with Scene(pools, Setting(far=True, durable=True, fua=False)) as scene:
        world = scene.world()
        world.live(steps, of_server="")
        assert world.truth.steps[Act.FLUSH, True] == 1


# Its numbers of operations are the same each time up to the first BACK.
AWAY, BACK, LOOK = (Step(act) for act in (Act.SERVER_GOES, Act.SERVER_COMES, Act.LOOK_AFTER))
FULL, FREED = (Step(act) for act in (Act.DISK_FULL, Act.DISK_FREED))


def test_what_was_written_back_from_an_overflow_file_does_not_return_after_a_failed_sync(pools: Path) -> None:
    steps = [AWAY, write(ANY, 1), BACK, LOOK, write(ANY, 2), FLUSH]
    with Scene(pools, Setting(far=True, overflow=True, durable=True)) as scene:
        world = scene.world()
        world.live(steps, f"{scene.number_of(Operation.SYNC, OVERFLOW, 2, steps) + 2}e", of_server="")
        assert world.truth.steps[Act.FLUSH, False] == 1
        world.live([FLUSH], of_server="")
        assert world.truth.steps[Act.FLUSH, False] == 2
        world.judge(MANY)


def test_a_bit_of_an_overflow_file_that_was_not_synced_is_not_trusted_after_a_kill(pools: Path) -> None:
    steps = [AWAY, write(FIRST, 1), BACK, LOOK]
    with Scene(pools, Setting(far=True, overflow=True)) as scene:
        world = scene.world()
        world.live(steps, f"{scene.number_of(Operation.SYNC, OVERFLOW, 2, steps) + 2}s", of_server="")
        assert world.ends == {-signal.SIGKILL: 1}
        world.live([write(FIRST, 2)], of_server="")
        world.judge(MANY)


def test_what_an_overflow_file_failed_to_sync_for_another_page_is_not_taken_to_be_durable(pools: Path) -> None:
    steps = [DRAIN, AWAY, FREEZE, write(ANY, 1, 8), write(FIRST, 1), BACK]
    with Scene(pools, Setting(far=True, overflow=True)) as scene:
        world = scene.world()
        world.live(steps, f"{scene.number_of(Operation.SYNC, OVERFLOW, 5, steps)}f", of_server="")
        world.live([DRAIN], of_server="")
        assert world.truth.steps[Act.DRAIN, False] == 1


def refuse_the_second_run(scene: Scene, steps: list[Step], after: Step) -> None:
    """The last step fails there; each of its pages is old or new, then and when the host has died *after* one more."""
    first_run = scene.number_of(Operation.WRITE, BACKING, len(steps), steps)
    world = scene.world()
    world.live(steps, f"{first_run + 1}f")
    assert world.truth.steps[steps[-1].act, False] == 1
    world.live([after], look=True)
    world.host_dies()
    world.live([])


def test_a_write_with_fua_that_is_refused_half_way_leaves_each_page_old_or_new(write_back: Scene) -> None:
    pages = replace(write(BORDER - 4, 2, 8), fua=True)
    refuse_the_second_run(write_back, [write(BORDER - 4, 1, 8), DRAIN, FREEZE, pages], DRAIN)


def test_a_durable_write_with_fua_that_is_refused_half_way_leaves_each_page_old_or_new(durable: Scene) -> None:
    pages, cut = write(ANY, 2, 4), PAGE // 2
    part = Step(Act.PART, pages.offset + cut, pages.length - cut, pages.data[cut:], fua=True)
    refuse_the_second_run(durable, [write(ANY, 1, 4), FLUSH, part], FLUSH)


@pytest.mark.parametrize("durable", [False, True], ids=["write-back", "durable"])
def test_a_full_disk_fails_what_has_no_blocks_and_nothing_else(pools: Path, durable: bool) -> None:
    steps = [
        write(ANY, 1, 2), DRAIN, FREEZE, FULL, write(ANY, 2, 2), read(ANY, 2), write(ANY + 1, 3, 2), read(ANY, 3),
        FREED, write(ANY + 1, 4, 2), FLUSH, read(ANY, 3),
    ]  # fmt: skip
    with Scene(pools, Setting(durable=durable)) as scene:
        world = scene.world()
        world.live(steps)
        assert (world.truth.steps[Act.WRITE, True], world.truth.steps[Act.WRITE, False]) == (3, 1)
        world.live([], look=True)


def test_a_full_overflow_file_fails_what_it_has_no_blocks_for(pools: Path) -> None:
    steps = [
        AWAY, write(ANY, 1), FULL, write(ANY, 2), read(ANY), write(ANY + 1, 1), FREED, write(ANY + 1, 2), BACK, LOOK,
        read(ANY, 2), FLUSH,
    ]  # fmt: skip
    with Scene(pools, Setting(far=True, overflow=True, durable=True)) as scene:
        world = scene.world()
        world.live(steps, of_server="")
        assert (world.truth.steps[Act.WRITE, True], world.truth.steps[Act.WRITE, False]) == (3, 1)
        assert world.truth.steps[Act.FLUSH, True] == 1
        world.live([], look=True, of_server="")


def test_what_is_written_through_is_durable_in_an_overflow_file_however_it_comes_there(pools: Path) -> None:
    steps = [write(FIRST, 1, 8), AWAY, FULL, write(FIRST, 2, 8), FREED, DEMOTE]
    with Scene(pools, Setting(far=True, overflow=True)) as scene:
        world = scene.world()
        world.live(steps, of_server="")
        assert (world.truth.steps[Act.WRITE, False], world.truth.steps[Act.DEMOTE, True]) == (1, 1)


@pytest.mark.parametrize("is_away", [False, True])
def test_a_planned_end_amid_requests_leaves_them_to_the_next_process(pools: Path, is_away: bool) -> None:
    pages = write(ANY, 1, 8)
    end = replace(pages, act=Act.REATTACH)
    steps = [FREEZE, LOOK, *[AWAY] * is_away, end, *[BACK] * is_away, read(ANY, 8)]
    with Scene(pools, Setting(far=True, overflow=True, vhost=True)) as scene:
        world = scene.world()
        assert world.live(steps, of_server="") == []
        assert world.truth.steps[Act.REATTACH, True] == 1


def test_what_a_killed_process_had_asked_of_a_slow_server_is_never_taken_for_a_newer_page(pools: Path) -> None:
    with Scene(pools, Setting(far=True, durable=True)) as scene:
        world = scene.world()
        world.live([write(ANY, 1), FLUSH], of_server="")
        while not world.ends[-signal.SIGKILL]:
            world.live([write(ANY, 2)], of_server="0l")
        world.live([write(ANY, 3), read(ANY)])
        assert Operation.LATE in {entry.operation for entry in world.entries}
        world.live([DEMOTE, read(ANY)], of_server="")
        world.judge(MANY)
