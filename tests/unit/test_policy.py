# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmemd.policy import Demand, by_name
from tmemd.policy.demand import Use
from tmemd.policy.share import share

MIB = 1 << 20
NAMES = ("fair", "greedy", "static", "reconf-static", "smart-alloc:0.75", "smart-alloc:6")
sizes = st.integers(0, 1 << 50)


def pool(name: str = "a", **values: Any) -> Demand:
    """A pool that wants nothing, of the values given; `heat` may be short."""
    known: dict[str, Any] = dict.fromkeys(Demand.__struct_fields__, 0) | {
        "name": name, "weight": 100, "cap": 1 << 60, "page_bytes": 1400, "put": 1, "heat": (), "use": Use(),
        "is_ephemeral": False, "read_seconds": 1e-4,
    }  # fmt: skip
    known |= values
    known["heat"] = (*known["heat"], *[0] * (16 - len(known["heat"])))
    known["used"] = values.get("used", known["overhead"] + sum(known["heat"]))
    return Demand(**known)


def hot(name: str, nbytes: int, **values: Any) -> Demand:
    """A pool all of whose pages were just used."""
    return pool(name, heat=(nbytes,), **values)


@st.composite
def demands(draw: st.DrawFn) -> list[Demand]:
    made = []
    for name in draw(st.lists(st.text("abcdef", min_size=1), unique=True, max_size=8)):
        minimum = draw(st.sampled_from((0, 0, MIB)) | sizes)
        made.append(
            pool(
                name,
                weight=draw(st.integers(1, 10_000)),
                minimum=minimum,
                cap=minimum + draw(sizes),
                used=draw(sizes),
                target=draw(sizes),
                overhead=draw(sizes),
                page_bytes=draw(st.integers(1, 4112)),
                heat=draw(st.lists(sizes, max_size=16)),
                put=draw(st.integers(0, 1 << 30)),
                use=Use(**{name: draw(st.floats(0, 1e15)) for name in Use.__struct_fields__}),
                puts=draw(st.integers(0, 1 << 30)),
                refused=draw(st.integers(0, 1 << 30)),
                file_reads=draw(st.integers(0, 1 << 30)),
                is_ephemeral=draw(st.booleans()),
                read_seconds=draw(st.floats(1e-9, 1e9)),
            )
        )
    return made


parties = st.lists(st.tuples(st.integers(1, 10_000) | st.integers(1, (1 << 64) - 1), sizes, sizes), max_size=12)


@given(sizes, parties)
def test_a_share_is_the_weight_times_one_level_between_floor_and_ceiling(budget: int, of: list[Any]) -> None:
    weights, floors = [w for w, _, _ in of], [f for _, f, _ in of]
    ceilings = [f + more for _, f, more in of]
    got = share(budget, weights, floors, ceilings)
    assert all(f <= g <= c for f, g, c in zip(floors, got, ceilings, strict=True))
    assert sum(got) <= max(budget, sum(floors))
    free = [(g, w) for f, g, c, w in zip(floors, got, ceilings, weights, strict=True) if f < g < c]
    for (a, v), (b, w) in itertools.combinations(free, 2):
        assert abs(Fraction(a, v) - Fraction(b, w)) <= max(Fraction(1, v), Fraction(1, w))
    if sum(ceilings) >= budget >= sum(floors):
        assert budget - sum(got) <= len(of)
    elif sum(ceilings) < budget:
        assert got == ceilings


@given(sizes, parties)
def test_nobody_at_the_ceiling_is_below_the_level_of_the_others(budget: int, of: list[Any]) -> None:
    weights, floors = [w for w, _, _ in of], [f for _, f, _ in of]
    ceilings = [f + more for _, f, more in of]
    got = share(budget, weights, floors, ceilings)
    wanting = [Fraction(g + 1, w) for g, w, c in zip(got, weights, ceilings, strict=True) if g < c]
    given_ = [Fraction(g, w) for g, w, f in zip(got, weights, floors, strict=True) if g > f]
    assert not wanting or not given_ or max(given_) <= min(wanting)


@pytest.mark.parametrize("name", NAMES)
@given(demands(), sizes)
def test_every_policy_keeps_budget_minimums_and_caps(name: str, known: list[Demand], budget: int) -> None:
    targets = by_name(name)(known, budget)
    assert set(targets) == {demand.name for demand in known}
    assert sum(targets.values()) <= max(budget, sum(demand.minimum for demand in known))
    assert all(demand.minimum <= targets[demand.name] <= demand.cap for demand in known)


@pytest.mark.parametrize("name", NAMES)
@given(demands(), sizes, st.randoms(use_true_random=False))
def test_the_order_of_pools_does_not_matter(name: str, known: list[Demand], budget: int, rng: random.Random) -> None:
    shuffled = known[:]
    rng.shuffle(shuffled)
    assert by_name(name)(known, budget) == by_name(name)(shuffled, budget)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=8), st.integers(MIB, 1 << 40))
def test_pools_that_all_want_more_have_ram_by_weight(weights: list[int], budget: int) -> None:
    known = [hot(str(i), 2 * budget, weight=weight) for i, weight in enumerate(weights)]
    targets = by_name("fair")(known, budget)
    for i, weight in enumerate(weights):
        assert abs(targets[str(i)] - budget * weight / sum(weights)) <= 1


def test_what_one_cannot_take_goes_to_the_others_by_weight() -> None:
    known = [hot("a", 1000 * MIB), hot("b", 1000 * MIB, weight=200), hot("c", 1000 * MIB, weight=400, cap=10 * MIB)]
    assert by_name("fair")(known, 100 * MIB) == {"a": 30 * MIB, "b": 60 * MIB, "c": 10 * MIB}
    known[0] = hot("a", 1000 * MIB, minimum=60 * MIB)
    assert by_name("fair")(known, 100 * MIB) == {"a": 60 * MIB, "b": 30 * MIB, "c": 10 * MIB}


def test_hot_pages_go_before_cold_ones_whatever_the_weights() -> None:
    cold = pool("cold", weight=10_000, used=500 * MIB, heat=(0,) * 15 + (500 * MIB,))
    targets = by_name("fair")([cold, hot("hot", 80 * MIB, weight=1)], 100 * MIB)
    assert targets["hot"] >= 80 * MIB
    assert targets["cold"] >= 11 * MIB


@pytest.mark.parametrize("pages", [0, MIB])
def test_a_light_pool_with_few_pages_does_not_part_the_others_by_weight_alone(pages: int) -> None:
    budget = 1000 * MIB
    one, other = hot("a", 800 * MIB), pool("b", used=1000 * MIB, heat=(0,) * 8 + (1000 * MIB,) + (0,) * 7)
    fair = by_name("fair")
    alone = fair([one, other], budget)
    assert alone["a"] > 800 * MIB
    beside = fair([one, other, hot("c", pages, weight=1)], budget)
    assert beside["a"] > 0.98 * alone["a"]


def test_a_pool_gets_no_more_than_it_can_fill_while_others_want_it() -> None:
    """Pages in the file are wanted when they are read or put again, not when they are only remembered as hot."""
    known = [hot("full", 100 * MIB), hot("away", 100 * MIB, used=10 * MIB, file_reads=1000)]
    targets = by_name("fair")(known, 100 * MIB)
    assert 10 * MIB < targets["away"] < 20 * MIB
    assert sum(targets.values()) >= 100 * MIB - 2


def test_what_is_read_back_finds_room_below_the_share_only() -> None:
    """A guest that reads all it has from end to end does not take the RAM of those who read theirs again."""
    known = [hot("busy", 100 * MIB), hot("reading", 100 * MIB, used=20 * MIB, file_reads=5000)]
    assert by_name("fair")(known, 100 * MIB)["reading"] >= 36 * MIB
    known[1] = hot("reading", 100 * MIB, used=40 * MIB, file_reads=5000)
    assert by_name("fair")(known, 100 * MIB)["reading"] <= 42 * MIB


def test_what_nobody_needs_goes_to_those_whose_hot_pages_are_in_the_file() -> None:
    idle = pool("idle", used=10 * MIB, heat=(0,) * 15 + (200 * MIB,))
    away = hot("away", 80 * MIB, used=10 * MIB)
    assert by_name("fair")([idle, away], 100 * MIB)["away"] >= 80 * MIB


def test_an_idle_pool_has_room_for_a_start() -> None:
    known = [hot("busy", 200 * MIB), pool("idle")]
    assert by_name("fair")(known, 128 * MIB) == {"busy": 126 * MIB, "idle": 2 * MIB}


def test_what_nobody_wants_is_shared_by_weight() -> None:
    targets = by_name("fair")([hot("a", MIB), pool("b", weight=300), pool("c", weight=100, cap=MIB)], 401 * MIB)
    assert targets == {"a": 100 * MIB, "b": 300 * MIB, "c": MIB}


def test_a_pool_that_is_being_filled_gets_room_before_its_ages_are_published() -> None:
    idle = pool("idle", used=100 * MIB, heat=(0,) * 15 + (100 * MIB,))
    filling = pool("filling", puts=10_000, refused=10_000)
    assert by_name("fair")([idle, filling], 100 * MIB)["filling"] >= 10_000 * 1400


LONG = 1000.0 * 100 * MIB  # 100 MiB that were not hot for a thousand ticks


def test_pages_that_are_seldom_read_count_as_older() -> None:
    heat = (0,) * 5 + (100 * MIB,)
    dull, server = (
        pool(name, heat=heat, use=Use(reads=5000.0, puts=1000.0, warm_reads=read, warm_bytes=LONG))
        for name, read in (("dull", 0.0), ("server", 10_000.0))
    )
    targets = by_name("fair")([dull, server], 100 * MIB)
    assert targets["server"] > 10 * targets["dull"]
    for unknown in (dull.use, Use(puts=1000.0)):  # nobody's are read, or it has had none so far
        other = msgspec.structs.replace(dull, name="other", use=unknown)
        targets = by_name("fair")([dull, other] if unknown is dull.use else [other, server], 100 * MIB)
        assert max(targets.values()) - min(targets.values()) < 5 * MIB


@pytest.mark.parametrize("reads", [2.0**-60, 1.0, 10.0])
def test_a_few_reads_say_nothing_of_how_often_pages_are_read(reads: float) -> None:
    """Nor do many that were long ago, nor the first after tmemd was started again."""
    heat = (0,) * 8 + (1000 * MIB,)
    known = [
        pool(name, heat=heat, use=Use(warm_reads=warm, warm_bytes=170.0 * 1000 * MIB))
        for name, warm in (("read", reads), ("idle", 0.0))
    ]
    targets = by_name("fair")(known, 1000 * MIB)
    assert targets["read"] == pytest.approx(targets["idle"], rel=0.01)


def test_hot_pages_count_as_older_where_the_guest_reads_less_than_it_puts() -> None:
    job, server = (
        hot(name, 100 * MIB, use=Use(reads=reads, puts=1000.0, warm_reads=warm, warm_bytes=LONG))
        for name, reads, warm in (("job", 0.0, 0.0), ("server", 5000.0, 10_000.0))
    )
    targets = by_name("fair")([job, server], 100 * MIB)
    assert targets["server"] > 2 * targets["job"]
    loop = msgspec.structs.replace(job, name="loop", use=msgspec.structs.replace(job.use, reads=1000.0))
    targets = by_name("fair")([loop, server], 100 * MIB)
    assert targets["loop"] == pytest.approx(targets["server"], rel=0.01)


def test_an_idle_pool_gives_way_to_one_that_is_used() -> None:
    idle = pool("idle", used=100 * MIB, heat=(*[0] * 5, 100 * MIB))
    assert by_name("fair")([idle, hot("busy", 100 * MIB)], 100 * MIB)["busy"] >= 96 * MIB


def cache(name: str, **values: Any) -> Demand:
    """An ephemeral pool whose source is as fast as the files of the others."""
    return pool(name, is_ephemeral=True, has_file=True, **values)


@pytest.mark.parametrize("age", [0, 2, 5, 15])
def test_at_equal_use_an_ephemeral_pool_gives_all_it_may_before_others_give_anything(age: int) -> None:
    heat = (*[0] * age, 100 * MIB)
    known = [cache("golden", heat=heat, minimum=8 * MIB), pool("web", heat=heat)]
    fair = by_name("fair")
    for budget in range(108 * MIB, 240 * MIB, 12 * MIB):
        assert fair(known, budget)["web"] >= 100 * MIB
    assert fair(known, 108 * MIB)["golden"] == 8 * MIB
    assert fair(known, 90 * MIB) == {"golden": 8 * MIB, "web": 82 * MIB}


def test_what_is_used_stays_before_what_is_not_although_it_is_ephemeral() -> None:
    known = [cache("golden", heat=(60 * MIB,)), pool("idle", heat=(*[0] * 8, 100 * MIB))]
    assert by_name("fair")(known, 100 * MIB)["golden"] >= 60 * MIB


def test_copies_of_a_slow_source_stay_before_those_of_a_fast_one() -> None:
    heat = (*[0] * 5, 100 * MIB)
    known = [cache("near", heat=heat), cache("far", heat=heat, read_seconds=1e-3)]
    assert by_name("fair")(known, 110 * MIB)["far"] >= 96 * MIB
    known.append(pool("web", heat=heat, read_seconds=1e-3))
    targets = by_name("fair")(known, 210 * MIB)
    assert targets["web"] >= 100 * MIB
    assert targets["far"] >= 90 * MIB


@pytest.mark.parametrize("seconds", [1e-4, 2e-4, 3.9e-4])
def test_files_that_may_lie_on_one_disk_are_as_far(seconds: float) -> None:
    known = [pool(name, heat=(0, 0, 0, 9 * MIB, 9 * MIB, 9 * MIB, 90 * MIB)) for name in "ab"]
    alike = by_name("fair")(known, 150 * MIB)
    known[1] = msgspec.structs.replace(known[1], read_seconds=seconds)
    assert by_name("fair")(known, 150 * MIB) == alike


def test_pages_of_a_far_file_stay_before_those_of_a_near_one_that_were_used_as_long_ago() -> None:
    heat = (*[0] * 8, 100 * MIB)
    known = [pool("near", heat=heat), pool("far", heat=heat, read_seconds=1e-3)]
    targets = by_name("fair")(known, 110 * MIB)
    assert targets["far"] >= 98 * MIB
    assert by_name("fair")([*known, pool("tiny", heat=(MIB,), read_seconds=1e-9)], 112 * MIB)["far"] >= 98 * MIB, (
        "a few pages set no scale"
    )


@pytest.mark.parametrize("seconds", [1e-3, 1.0, 1e9])
def test_however_far_a_file_is_others_keep_what_is_hot_and_within_their_share(seconds: float) -> None:
    """Also of one that hangs."""
    far = pool("far", heat=(10 * MIB, *[10 * MIB] * 15), read_seconds=seconds)
    assert by_name("fair")([hot("near", 50 * MIB), far], 100 * MIB)["near"] >= 49 * MIB


def test_what_is_read_back_from_a_far_file_finds_room_beyond_the_share() -> None:
    """More than the device keeps free for writes, a twentieth, or it would never grow."""
    known = [pool(name, heat=(*[2 * MIB] * 15, 70 * MIB), used=95 * MIB, file_reads=500) for name in ("near", "far")]
    alike = by_name("fair")(known, 200 * MIB)
    assert alike["near"] == alike["far"] == 100 * MIB
    known[1] = msgspec.structs.replace(known[1], read_seconds=2e-3)
    assert by_name("fair")(known, 200 * MIB)["far"] > 100 * MIB


def test_a_file_that_nothing_was_read_from_yet_is_as_near_as_any() -> None:
    heat = (*[0] * 8, 100 * MIB)
    known = [pool("new", heat=heat, read_unknown=True), pool("disk", heat=heat, read_seconds=5e-3)]
    targets = by_name("fair")(known, 110 * MIB)
    assert targets["new"] == pytest.approx(targets["disk"], rel=0.01)


def test_copies_of_a_far_source_stay_before_pages_of_a_near_file() -> None:
    heat = (*[0] * 8, 100 * MIB)
    known = [cache("far", heat=heat, read_seconds=2e-3), pool("near", heat=heat)]
    assert by_name("fair")(known, 130 * MIB)["far"] >= 90 * MIB


def test_what_an_ephemeral_pool_misses_takes_nothing_from_what_is_hot() -> None:
    """A guest that reads its whole image, once: each miss is put, and nobody reads it again."""
    scan = cache("scan", puts=50_000, file_reads=50_000, put=10**6)
    targets = by_name("fair")([scan, hot("web", 100 * MIB)], 110 * MIB)
    assert targets["web"] >= 100 * MIB
    assert by_name("fair")([scan, pool("idle", heat=(*[0] * 5, 100 * MIB))], 110 * MIB)["scan"] > 32 * MIB


def test_greedy_never_takes_back() -> None:
    known = [pool("first", used=100 * MIB), pool("late", puts=1000, refused=1000)]
    assert by_name("greedy")(known, 100 * MIB) == {"first": 100 * MIB, "late": 0}


def test_greedy_gives_what_is_free_to_those_who_put() -> None:
    known = [pool("a", used=10 * MIB), pool("b", used=10 * MIB, puts=1_000_000)]
    targets = by_name("greedy")(known, 100 * MIB)
    assert targets["b"] >= 89 * MIB
    assert targets["a"] >= 10 * MIB


def test_static_is_by_weight_and_reconfigured_for_those_that_ever_put() -> None:
    known = [pool("a"), pool("b", weight=300), pool("c", weight=400, put=0)]
    assert by_name("static")(known, 800) == {"a": 100, "b": 300, "c": 400}
    assert by_name("reconf-static")(known, 800) == {"a": 200, "b": 600, "c": 0}


def test_smart_alloc_moves_targets_by_its_percentage() -> None:
    failing, idle = pool("failing", target=400, used=400, refused=1), pool("idle", target=500, used=10)
    assert by_name("smart-alloc:10")([failing, idle], 1000) == {"failing": 500, "idle": 450}
    crowded = [pool("a", target=920, used=900, refused=1), pool("b", target=520, used=500, refused=1)]
    assert by_name("smart-alloc:10")(crowded, 800) == {"a": 500, "b": 300}


@pytest.mark.parametrize("name", ["", "Fair", "smart-alloc", "smart-alloc:", "smart-alloc:0", "smart-alloc:101",
                                  "smart-alloc:nan", "smart-alloc:-1", "smart-alloc:1e1", "fair "])  # fmt: skip
def test_an_unknown_policy_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="is no policy: there are fair, greedy, static, reconf-static, smart-alloc:P"):
        by_name(name)
