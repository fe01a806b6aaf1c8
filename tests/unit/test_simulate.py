# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.harness import ROOT
from tests.support.recordings import HEADER, pool, record
from tmemd.binding._core import PROMOTE_AGE
from tmemd.cli import main
from tmemd.cli.simulate import POLICIES
from tmemd.policy import Demand, by_name
from tmemd.simulation.recording import PoolRecord, Record, Recording, Writer, check, read
from tmemd.simulation.simulate import Outcome, Times, outcome, recorded, simulate, times
from tmemd.simulation.storemodel import DEMOTIONS_PER_SECOND, Copies, Counts, Flow, Space, Store
from tmemd.store.poolfile import GENERATIONS, Ages, Counters

MIB = 1 << 20
NAMES = ("fair", "greedy", "static", "reconf-static", "smart-alloc:4")


def by_age(**pages: int) -> list[int]:
    return [pages.get(f"a{age}", 0) for age in range(GENERATIONS)]


def total(store: Store) -> float:
    return store.in_ram + store.in_file


def room(pages: float, **values: Any) -> Space:
    """Space for so many pages of one byte."""
    return Space(target=int(pages), index=0, page=1, **values)


def filled(n: int, pages: float) -> Store:
    """*n* pages put where there is room for *pages*."""
    store = Store()
    store.apply(Flow(n, (), ()), room(pages))
    return store


def test_puts_beyond_the_room_spill() -> None:
    store = filled(100, 60)
    assert (store.in_ram, store.in_file, store.counts.spills) == (60, 40, 40)
    store.apply(Flow(10, (), ()), room(1000, frozen=True))
    assert store.counts.spills == 50


def test_a_falling_target_moves_the_oldest_out_as_fast_as_the_disk_takes_them() -> None:
    store = filled(10_000, 20_000)
    store.age()
    store.apply(Flow(10_000, (), ()), room(20_000))
    store.maintain(room(5000), 0.5)
    assert store.ram_by_age()[:2] == [10_000, 10_000 - DEMOTIONS_PER_SECOND / 2]
    assert store.counts.demotion_writes == store.counts.demotions == DEMOTIONS_PER_SECOND / 2


def test_room_is_made_for_pages_to_come_of_those_that_are_not_young() -> None:
    store = filled(1000, 1000)
    store.maintain(room(1000), 0.1)
    assert store.counts.demotions == 0
    store.age()
    store.age()
    store.apply(Flow(100, (), ()), room(1000))
    store.maintain(room(1000), 0.1)
    assert 10 < store.counts.demotions <= 100
    assert store.ram_by_age()[0] == 0


def test_what_is_read_from_the_file_is_put_again_if_it_is_young_and_is_not_written_again() -> None:
    store = filled(100, 50)
    store.age()
    store.apply(Flow(0, (), by_age(a1=100)), room(1000))
    assert (store.counts.gets, store.counts.file_reads, store.counts.promotions) == (50, 50, 50)
    store.maintain(room(0), 1)
    assert (store.in_ram, store.counts.demotions, store.counts.demotion_writes) == (0, 100, 50)
    for _ in range(PROMOTE_AGE):
        store.age()
    store.apply(Flow(0, (), by_age(a6=100)), room(1000))
    assert store.counts.promotions == 50


def test_a_page_read_again_and_again_is_read_from_the_file_once_if_there_is_room() -> None:
    store = filled(10, 0)
    store.apply(Flow(0, (), by_age(a0=1000)), room(100))
    assert store.counts.file_reads == pytest.approx(10)
    store.maintain(room(0), 1)
    store.apply(Flow(0, (), by_age(a0=1000)), room(0))
    assert store.counts.file_reads == pytest.approx(1010)


def copies(in_source: float) -> Copies:
    """Of a device whose pages nobody has read yet."""
    store = Copies()
    store.pages[2][-1] = in_source
    return store


def test_copies_come_with_reads_and_go_at_once_without_a_write() -> None:
    store = copies(100_000)
    store.apply(Flow(0, (), by_age(a15=60_000)), room(1e6))
    assert (store.in_ram, store.counts.file_reads, store.counts.gets) == (60_000, 60_000, 0)
    store.maintain(room(10_000), 0.1)
    assert (store.in_ram, store.counts.demotions) == (10_000, 50_000)
    store.apply(Flow(0, (), by_age(a1=60_000)), room(1e6))
    assert (store.counts.gets, store.counts.file_reads) == (10_000, 110_000)
    assert (store.counts.demotion_writes, store.counts.spills) == (0, 0)
    store.apply(Flow(5, (), ()), room(1e6, frozen=True))
    assert (store.in_ram, store.counts.spills) == (60_000, 0), "written through, and not kept"


def test_of_what_is_read_for_the_first_time_little_comes_into_a_full_pool() -> None:
    store = copies(1000)
    store.apply(Flow(0, (), by_age(a15=100)), room(100))
    assert store.ram_by_age()[0] == 100
    store.age()
    store.apply(Flow(0, (), by_age(a15=160)), room(100))
    assert (store.ram_by_age()[0], store.ram_by_age()[1]) == pytest.approx((10, 90), abs=1)
    store.apply(Flow(0, (), by_age(a2=80)), room(100))
    assert store.ram_by_age()[0] == pytest.approx(90, abs=10), "what was used before comes in"


@pytest.mark.parametrize("kind", [Store, Copies])
@given(st.lists(st.tuples(*[st.integers(0, 1 << 24)] * 4, st.integers(0, 15)), max_size=20))
def test_no_page_is_made_or_lost(kind: type[Store], steps: list[tuple[int, int, int, int, int]]) -> None:
    store, expected = kind(), 0
    for puts, reads, freed, pages, age in steps:
        expected = expected + puts - min(freed, expected)
        many = [0.0] * GENERATIONS
        many[age] = reads
        store.apply(Flow(0, [freed if other == age else 0 for other in range(GENERATIONS)], ()), room(pages))
        store.apply(Flow(puts, (), many), room(pages))
        store.maintain(room(pages // 2), 1)
        store.age()
        assert all(n >= -1 for row in store.pages for n in row)
        assert total(store) == pytest.approx(expected, rel=1e-6, abs=0.1)


def filling(weights: dict[str, int], seconds: int, rate: int) -> Recording:
    """Pools that each put *rate* pages a second of 4096 bytes, and read as many of the youngest."""
    records: list[Record] = []
    for at in range(seconds):
        n = at * rate
        pools = [
            pool(
                name, weight=weight, puts=n, gets=n, pages_in_tmem=n, used_bytes=n * 4096, published=at,
                minimum_bytes=0, limit_bytes=1 << 40, target_bytes=64 * MIB,
                stored_bytes=tuple(by_age(a0=n * 4096)),
            )
            for name, weight in weights.items()
        ]  # fmt: skip
        records.append(record(at, *pools, budget=64 * MIB))
    return Recording(HEADER, tuple(records))


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_is_enough_costs_nothing(name: str) -> None:
    small = filling({"a": 1}, 10, 100)
    counts = simulate(small, by_name(name))["a"]
    assert (counts.spills, counts.file_reads, counts.demotions) == (0, 0, 0)
    assert counts.puts == 900


def test_weights_decide_who_spills() -> None:
    pools = simulate(filling({"a": 100, "b": 100, "c": 300}, 30, 1000), by_name("fair"))
    moved = {name: counts.spills + counts.demotion_writes for name, counts in pools.items()}
    assert moved["a"] == pytest.approx(moved["b"])
    assert moved["c"] < moved["a"] * 0.8


def beside_a_cache(seconds: int) -> Recording:
    """A pool with 32 MiB that are read all the time, and one that has as much of its source and reads it as often."""
    n, records = 8192, []
    for at in range(seconds):
        read = tuple(by_age(a1=at * n // 4))
        known: dict[str, Any] = {
            "gets": read, "pages_in_tmem": n, "used_bytes": n * 4096, "published": at, "generation": at // 5 + 1,
            "limit_bytes": 1 << 40, "minimum_bytes": 0, "target_bytes": 64 * MIB,
            "stored_bytes": tuple(by_age(a1=n * 4096)),
        }  # fmt: skip
        golden = pool("golden", is_ephemeral=True, puts=n, promotions=n, **known)
        records.append(record(at, pool("web", puts=n, **known), golden, budget=40 * MIB))
    return Recording(HEADER, tuple(records))


def test_copies_give_way_and_what_they_miss_is_priced_by_their_source() -> None:
    known = beside_a_cache(30)
    found = simulate(known, by_name("fair"))
    assert found["golden"].demotions > 5000
    assert found["golden"].file_reads > 5000
    assert found["golden"].demotion_writes == found["golden"].spills == found["golden"].puts == 0
    assert found["web"].demotions < 100
    dear = Times(1.0, 1.0, True, True, {"golden": 10.0})
    assert outcome({"golden": Counts(file_reads=2), "web": Counts(file_reads=3)}, dear).cost_seconds == 23


def test_the_source_of_a_cache_is_timed_by_itself() -> None:
    before, web, golden = pool("web"), pool("web", file_reads=2000), pool("golden", is_ephemeral=True, file_reads=2000)
    slow = type(web)(sample=golden.sample, file_read_ns=2000 * 9_000_000, spill_ns=7)
    none = type(web)(sample=pool("golden", is_ephemeral=True).sample, file_read_ns=0, spill_ns=0)
    quick = type(web)(sample=web.sample, file_read_ns=2000 * 50_000, spill_ns=0)
    found = times(Recording(HEADER, (record(0, before, none), record(1, quick, slow))))
    assert found.sources == {"golden": pytest.approx(9e-3)}
    assert found.read == pytest.approx(50e-6)


def test_a_budget_of_ones_own_replaces_the_recorded_one() -> None:
    known = filling({"a": 1}, 30, 1000)
    tight = simulate(known, by_name("fair"), 16 * MIB)["a"]
    ample = simulate(known, by_name("fair"), 1 << 40)["a"]
    assert tight.spills + tight.demotion_writes > 20_000
    assert ample.spills + ample.demotion_writes == 0


def test_simulation_is_deterministic() -> None:
    known = filling({"a": 100, "b": 200}, 20, 1000)
    assert simulate(known, by_name("fair")) == simulate(known, by_name("fair"))


def test_a_pool_that_was_made_anew_begins_at_nothing() -> None:
    before, after = filling({"a": 1}, 5, 100).records, filling({"a": 1}, 4, 10).records
    later = [Record(at=each.at + 10, budget_bytes=each.budget_bytes, pools=each.pools) for each in after]
    known = Recording(HEADER, (*before, *later))
    assert simulate(known, by_name("fair"))["a"].puts == 400 + 30
    assert recorded(known)["a"].puts == 400 + 30


def test_times_are_measured_or_said_to_be_assumed() -> None:
    known = filling({"a": 1}, 2, 10)
    assert not times(known).read_measured
    one, other = pool(file_reads=0, spills=0), pool(file_reads=2000, spills=4000)
    slow = type(other)(sample=other.sample, file_read_ns=2000 * 300_000, spill_ns=4000 * 70_000)
    found = times(Recording(HEADER, (record(0, one), record(1, slow))))
    assert (found.read, found.write) == pytest.approx((300e-6, 70e-6))
    assert found.read_measured
    assert outcome({"a": Counts(file_reads=10, spills=5, demotion_writes=5)}, found).cost_seconds == pytest.approx(
        10 * 300e-6 + 10 * 70e-6
    )


def hostile(rng: random.Random) -> Recording:
    """Whatever passes the reader's checks."""

    def number() -> int:
        return rng.choice((0, 1, 4096, 1 << 62, rng.randrange(1 << rng.randrange(1, 63))))

    def one(name: str) -> PoolRecord:
        counters = {field: number() for field in Counters.__struct_fields__ if rng.random() < 0.3}
        ages = {field: tuple(number() for _ in range(GENERATIONS)) for field in Ages.__struct_fields__[:-2]}
        own = {"published": number(), "generation": number(), "target_bytes": number(), "minimum_bytes": number()}
        own |= {"frozen": rng.random() < 0.1, "is_ephemeral": rng.random() < 0.3}
        return pool(name, cap_bytes=rng.choice((None, number())), **(counters | ages | own))

    records = []
    for at in range(rng.randrange(5)):
        known = record(at, *map(one, rng.sample("abc", rng.randrange(4))), budget=number())
        check(known)
        records.append(known)
    return Recording(HEADER, tuple(records))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(st.integers(0, 1 << 32))
def test_hostile_numbers_break_nothing(name: str, seed: int) -> None:
    known = hostile(random.Random(seed))
    for counts in simulate(known, by_name(name)).values():
        assert counts.puts >= 0
        assert counts.spills >= 0
    times(known)


@pytest.mark.parametrize("generations", [(0, 0, 2, 2, 3), (0, 0, 0, 0, 0)])
def test_pages_grow_old_with_the_devices_generations_or_else_by_the_clock(generations: Sequence[int]) -> None:
    """A new device's first generation counts as 0 until it ends, at whatever record."""
    heats = []

    def policy(demands: Sequence[Demand], budget: int) -> dict[str, int]:
        heats.append([age for age, nbytes in enumerate(demands[0].heat) if nbytes])
        return {each.name: budget for each in demands}

    records = [
        record(at, pool(puts=1000 * (at > 0), published=n, generation=generation))
        for n, (at, generation) in enumerate(zip((0, 4, 4.5, 5.5, 10), generations, strict=True))
    ]
    simulate(Recording(HEADER, tuple(records)), policy)
    assert heats == ([[], [0], [1], [1], [2]] if any(generations) else [[], [0], [0], [1], [2]])


def recording_of(workload: str) -> Recording:
    return read(ROOT / "benchmarks" / "recordings" / f"{workload}.jsonl.xz")


def outcomes(workload: str, names: Sequence[str]) -> dict[str, Outcome]:
    known = recording_of(workload)
    return {name: outcome(simulate(known, by_name(name)), times(known)) for name in names}


GOLDEN = {
    "fair": (2909, 1776, 51868, 1818),
    "greedy": (13763, 11247, 60209, 10821),
    "smart-alloc:6": (3827, 6388, 52715, 2569),
}


def test_a_recording_of_real_devices_is_replayed_as_ever() -> None:
    """File reads, spills, demotion's writes, promotions: they change with policies and devices only."""
    found = outcomes("idle-giant", list(GOLDEN))
    for name, expected in GOLDEN.items():
        total = found[name].total
        assert (total.file_reads, total.spills, total.demotion_writes, total.promotions) == pytest.approx(
            expected, abs=1
        )


@pytest.mark.parametrize(
    "workload", ["phased", "skewed", "all-at-once", "idle-giant", "batch", "leak", "builds", "scans"]
)
def test_ours_is_best_or_equal(workload: str) -> None:
    cost = {name: found.cost_seconds for name, found in outcomes(workload, POLICIES).items()}
    assert cost["fair"] <= (1.02 if workload == "skewed" else 1.01) * min(cost.values())


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    with Writer(path, HEADER) as writer:
        for each in filling({"a": 100, "b": 200}, 30, 1000).records:
            writer.add(each)
    return path


def run(output: pytest.CaptureFixture[str], *command: object) -> tuple[int, str]:
    status = main(["simulate", *map(str, command)])
    return status, output.readouterr().out


def test_simulate_prints_a_line_for_each_policy(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, recording)
    assert status == 0
    rows = [line.split()[0] for line in text.splitlines()[1:-1]]
    assert rows == ["(as", "fair", "greedy", "static", "reconf-static", *(f"smart-alloc:{p}" for p in (0.75, 2, 4, 6))]
    assert "assumed" in text


def test_simulate_prints_json(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, recording, "--policy=greedy", "--policy=fair", "--budget=32M", "--json")
    known: Any = json.loads(text)
    assert status == 0
    assert list(known["outcomes"]) == ["as recorded", "greedy", "fair"]
    assert known["outcomes"]["fair"]["total"]["puts"] == 2 * 29 * 1000
    assert known["outcomes"]["fair"]["cost_seconds"] > 0


def test_simulate_takes_a_file_to_be_as_far_as_is_said(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--policy=static", "--budget=32M", "--json")
    near, far = (
        json.loads(run(capsys, recording, *options, *more)[1])["outcomes"]["static"]
        for more in ((), ("--miss=b=0.01",))
    )
    assert far["total"] == near["total"], "static does not go by it"
    assert far["cost_seconds"] > near["cost_seconds"]
    assert "of the file of b 10000 us, as was said" in run(capsys, recording, "--miss=b=0.01")[1]


@pytest.mark.parametrize("miss", ["b", "b=", "b=x", "=1", "b=0", "../b=1"])
def test_a_miss_that_is_none_is_a_usage_error(recording: Path, miss: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["simulate", str(recording), f"--miss={miss}"])
    assert usage.value.code == 2


@pytest.mark.parametrize("far", ["middle", "small"])
def test_the_pages_of_a_far_file_are_missed_less(far: str) -> None:
    """And all wait less than where nobody knows how far it is."""
    known = recording_of("skewed")
    said = {name: 1e-3 if name == far else 1e-4 for name in ("large", "middle", "small")}
    alike = dict.fromkeys(said, 1e-4)
    price = msgspec.structs.replace(times(known), said=said)
    before, after = (simulate(known, by_name("fair"), said=each) for each in (alike, said))
    assert after[far].file_reads < before[far].file_reads
    assert outcome(after, price).cost_seconds < 0.9 * outcome(before, price).cost_seconds


def test_simulate_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "none")]) == 1
    assert "none: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["simulate", "x", "--policy=best"])
    assert "'best' is no policy" in capsys.readouterr().err
