# SPDX-License-Identifier: BSD-3-Clause
"""The mutants' tool: what the rules make, which are chosen, what is remembered, and how a run of tests is judged."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.mutants import c_rules, ledger, python_rules
from tests.mutants.__main__ import SURVIVORS
from tests.mutants.judge import BLIND, BY_RULE, CANARIES, NEAR, Baseline, Judge, order
from tests.mutants.ledger import Ledger, Result, Score, explanations
from tests.mutants.mutant import Fault, Mutant, name_all
from tests.mutants.sample import choose, mutants_of
from tests.mutants.tree import Run, Tree
from tests.support.harness import ROOT


def c_mutants(body: str) -> list[Mutant]:
    source = f"int f(struct s *s)\n{{\n{body}\n}}\n".encode()
    return name_all("f.c", source, c_rules.faults(source))


def made(body: str) -> set[tuple[str, str]]:
    """The rules that apply to a C body, each with what it makes of it."""
    source = f"int f(struct s *s)\n{{\n{body}\n}}\n".encode()
    return {
        (mutant.rule, mutant.apply(source).decode().split("{\n", 1)[1].removesuffix("\n}\n"))
        for mutant in c_mutants(body)
    }


@pytest.mark.parametrize(
    ("body", "rule", "mutated"),
    [
        ("if (error) return error;", "error-ignored", "if ((void)(error), 0) return error;"),
        ("if (put(s) < 0) return errno;", "error-ignored", "if ((void)(put(s) < 0), 0) return errno;"),
        ("int error = g(s);", "error-ignored", "int error = ((void)g(s), 0);"),
        ("if (!error) g(s);", "error-ignored", "if (1) g(s);"),
        ("return x < 0 ? errno : 0;", "error-ignored", "return ((void)(x < 0 ? errno : 0), 0);"),
        ("lock(s->a); g(s); unlock(s->a);", "lock-left-out", "(void)0; g(s); (void)0;"),
        ("lock_pages(s, 1); unlock_pages(s, 1);", "lock-left-out", "(void)0; (void)0;"),
        ("pthread_rwlock_rdlock(s); pthread_rwlock_unlock(s);", "lock-left-out", "(void)0; (void)0;"),
        (
            "int error = lock_in_index(s); if (error) return error; g(s); unlock_run(s);",
            "lock-left-out",
            "int error = lock_in_index(s); if (error) return error; unlock_run(s); g(s); (void)0;",
        ),
        (
            "if (!try_lock(s)) return; g(s); unlock(s, 1);",
            "lock-left-out",
            "if (!try_lock(s)) return; unlock(s, 1); g(s); (void)0;",
        ),
        ("if (fdatasync(s->fd) < 0) g(s);", "sync-left-out", "if (0 < 0) g(s);"),
        ("error = bitmap_set(s, 1);", "mark-left-out", "error = 0;"),
        ("bitmap_keep(s, 1);", "mark-left-out", "(void)0;"),
        ("x = word | TM_WORD_CLEAN;", "flag-left-out", "x = word;"),
        ("x = word & ~TM_WORD_CLEAN;", "flag-left-out", "x = word;"),
        ("return word & TM_WORD_CLEAN;", "flag-left-out", "return 0;"),
        ("s->listed = true;", "flag-left-out", "(void)0;"),
        ("atomic_store(&s->state, 1);", "flag-left-out", "(void)0;"),
        ("g(s, true);", "flag-left-out", "g(s, false);"),
        ("stats_add(&s->gets, 1);", "count-left-out", "(void)0;"),
        ("s->n_live--;", "count-left-out", "(void)0;"),
        ("slots_free(s, 1);", "release-left-out", "(void)0;"),
        ("while (i < n) g(s);", "border", "while (i <= n) g(s);"),
        ("x = n - 1;", "border", "x = n;"),
    ],
)
def test_what_the_rules_make_of_c(body: str, rule: str, mutated: str) -> None:
    assert (rule, mutated) in made(body)


@pytest.mark.parametrize(
    "body", ["if (a) g(s);", "tm_map_is_cleaning(s);", "pthread_mutex_destroy(&s->lock);", "x = got < 0;", "g(s);"]
)
def test_what_no_rule_of_c_is_for(body: str) -> None:
    assert made(body) == set()


@pytest.mark.parametrize(
    ("line", "rule", "mutated"),
    [
        ("raise PoolError(name)", "error-ignored", "pass"),
        ("if a and b: g()", "condition", "if not (a and b): g()"),
        ("os.fsync(fd)", "sync-left-out", "pass"),
        ("fcntl.flock(fd, 1)", "lock-left-out", "pass"),
        ("return locks.try_lock(fd)", "lock-left-out", "return True"),
        ("os.close(fd)", "release-left-out", "pass"),
        ("self._done.add(name)", "mark-left-out", "pass"),
        ("self._on = True", "flag-left-out", "pass"),
        ("fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)", "flag-left-out", "fd = os.open(path, os.O_RDWR)"),
        ("self.n += 1", "count-left-out", "pass"),
        ("return low <= n < high", "border", "return low <= n <= high"),
        ("return (n) >= (m)", "border", "return (n) > (m)"),
        ("x = n + 1", "border", "x = n"),
    ],
)
def test_what_the_rules_make_of_python(line: str, rule: str, mutated: str) -> None:
    source = f"def f(self):\n    {line}\n".encode()
    found = name_all("f.py", source, python_rules.faults(source))
    assert (rule, f"def f(self):\n    {mutated}\n") in {(each.rule, each.apply(source).decode()) for each in found}


def test_a_lock_around_a_block_is_left_out_and_the_block_stays() -> None:
    source = b"async def f(self):\n    async with self._lock:\n        g()\n"
    (mutant,) = name_all("f.py", source, python_rules.faults(source))
    assert mutant.apply(source) == b"async def f(self):\n    if True:\n        g()\n"


def test_each_mutant_of_this_tree_is_another_program() -> None:
    everything = mutants_of(ROOT)
    assert len({mutant.id for mutant in everything}) == len(everything)
    for mutant in everything:
        source = (ROOT / mutant.file).read_bytes()
        assert mutant.apply(source) != source
        if mutant.file.endswith(".py"):
            compile(mutant.apply(source), mutant.file, "exec")


def test_mutants_of_c_compile(tmp_path: Path) -> None:
    for mutant in choose(mutants_of(ROOT, ["tmemd/core/*.c"]), 12, 0):
        path = tmp_path / Path(mutant.file).name
        path.write_bytes(mutant.apply((ROOT / mutant.file).read_bytes()))
        include = [f"-I{ROOT / 'tmemd/core'}", f"-I{sysconfig.get_path('include')}"]
        compiler = ["gcc", "-std=gnu11", "-fsyntax-only", *include, str(path)]
        assert subprocess.run(compiler, check=False).returncode == 0, mutant


def test_ids_outlive_edits_elsewhere() -> None:
    before = c_mutants("int a = 1;\nif (error) return error;\nx = n - 1;")
    after = c_mutants("g(s);\n\nif (error)\n    return error;\n/* why */\nx = n - 1;")
    assert [each.id for each in before] == [each.id for each in after]
    twice = c_mutants("x = n - 1; x = n - 1;")
    assert len({each.id for each in twice}) == 2


def test_the_choice_is_even_and_the_same_each_time() -> None:
    everything = mutants_of(ROOT)
    groups = {(each.file, each.rule) for each in everything}
    chosen = choose(everything, len(groups), 0)
    assert {(each.file, each.rule) for each in chosen} == groups
    assert choose(reversed(everything), 50, 0) == chosen[:50]
    assert choose(everything, 50, 1) != chosen[:50]


def result(mutant: Mutant, verdict: ledger.Verdict, source: str = "s", tests: str = "t", by: str = "") -> Result:
    return Result(mutant.id, verdict, by, 1.0, source, tests)


def test_results_are_found_again_until_what_they_say_may_have_changed(tmp_path: Path) -> None:
    caught, survived = c_mutants("s->n++; s->m++;")
    path = tmp_path / "results"
    known = Ledger(path)
    known.add(result(caught, "caught", by="tests/x.py::test"))
    known.add(result(survived, "survived"))
    again = Ledger(path)
    assert again.of(caught, "s", "t") == again.of(caught, "s", "other tests") == known.of(caught, "s", "t")
    assert again.of(caught, "other source", "t") is None
    assert again.of(survived, "s", "t") is not None
    assert again.of(survived, "s", "other tests") is None
    assert again.killers(survived) == {"tests/x.py::test": 1}
    assert Ledger(path, forget={caught.id}).of(caught, "s", "t") is None


def test_a_line_that_was_not_finished_costs_only_itself(tmp_path: Path) -> None:
    one, other = c_mutants("s->n++; s->m++;")
    path = tmp_path / "results"
    Ledger(path).add(result(one, "caught"))
    with path.open("ab") as file:
        file.write(b'{"id": "f.c:f:')
    Ledger(path).add(result(other, "caught"))
    known = Ledger(path)
    assert known.of(one, "s", "t") is not None
    assert known.of(other, "s", "t") is not None


def test_the_score_leaves_out_what_no_test_can_notice() -> None:
    mutants = c_mutants("s->a++; s->b++; s->c++; s->d++; s->e++; s->f++;")
    verdicts: list[ledger.Verdict] = ["caught", "hung", "survived", "survived", "same code", "does not compile"]
    results = [(each, result(each, verdict)) for each, verdict in zip(mutants, verdicts, strict=True)]
    score = Score(results, {mutants[3].id: "why"})
    assert (len(score.counted), score.survivors) == (3, [mutants[2]])
    assert score.share == pytest.approx(2 / 3)
    assert score.table().row_count == 1 + 1 + 2  # one rule and one file, and the sums


def test_the_list_of_survivors_is_whole(tmp_path: Path) -> None:
    assert all(explanations(SURVIVORS).values())
    (bad := tmp_path / "bad.toml").write_text('[[survivor]]\nid = "x"\n')
    with pytest.raises(msgspec.ValidationError):
        explanations(bad)


def test_own_near_cheap_and_successful_tests_go_first() -> None:
    a, b, c, d = "tests/unit/test_a.py", "tests/model/test_b.py", "tests/model/test_c.py", "tests/core/test_d.py"
    baseline = Baseline("", {f"{a}::t": 1.0, f"{b}::t": 9.0, f"{c}::t": 3.0, f"{d}::t": 20.0})

    def ordered(file: str, rule: str = "border", **kills: int) -> list[str]:
        return order(file, rule, baseline, Counter({f"tests/model/test_{name}.py::t": n for name, n in kills.items()}))

    assert ordered("tmemd/core/map.c") == [c, b, d, a]
    assert ordered("tmemd/core/b.c") == [b, c, d, a]
    assert ordered("tmemd/core/map.c", b=5) == [b, c, d, a]
    assert ordered("tmemd/core/map.c", "lock-left-out") == [d, c, b, a]
    assert ordered("tmemd/daemon/server.py") == [a]
    assert baseline.limits()[f"{b}::t"] == 72


def test_all_files_that_are_named_are_there() -> None:
    for tests in (*chain(*NEAR.values(), *BLIND.values(), *BY_RULE.values()), *(test for *_, test in CANARIES)):
        assert list(ROOT.glob(f"{tests}*")), tests
    for source in (*NEAR, *BLIND, *(file for file, *_ in CANARIES)):
        assert list(ROOT.glob(f"{source}*")), source


TESTS = """
import os, pathlib, time
def test_notes(): (pathlib.Path(__file__).parent / "ran").touch()
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(1000)
def test_crashes(): os.abort()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree with a file of tests of which one passes, one fails, one hangs and one crashes."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = vm")
    return Tree(ROOT, tmp_path, threading.Event())


@pytest.mark.parametrize(
    ("first", "hung", "by"),
    [
        ([], False, "test_it.py::test_fails"),
        (["test_it.py::test_hangs"], True, "test_it.py::test_hangs"),
        (["test_it.py::test_crashes"], False, "test_it.py::test_crashes"),
    ],
)
def test_runs_end_with_the_first_failure_hang_or_crash(
    tree: Tree, tmp_path: Path, first: list[str], *, hung: bool, by: str
) -> None:
    limits = {"test_it.py::test_hangs": 0.5}
    run = tree.test(["test_it.py"], first=first, limits=limits, limit=60, total=60)
    assert (run.passed, run.hung, run.by) == (False, hung, by), run.output
    assert (tmp_path / "ran").exists() is not bool(first)


def test_a_mutant_of_python_is_tested_with_the_extension_that_one_of_c_took_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: set[bool] = set()

    def build(_: Tree) -> str:
        built.add(True)
        return ""

    monkeypatch.setattr(Tree, "build", build)
    monkeypatch.setattr(Tree, "test", lambda *_, **__: Run(bool(built), False, "", [], ""))
    judge = Judge(ROOT, tmp_path, Console(), Ledger(tmp_path / "results"), verify=False)
    mutant = Mutant("an id", "tmemd/sizes.py", Fault("condition", "f", 1, ()))
    assert judge._verdict(Tree(ROOT, ROOT, threading.Event()), mutant) == (ledger.SURVIVED, "")


def test_a_failure_is_believed_only_when_it_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky, sound = "tests/unit/test_a.py::test_flaky", "tests/unit/test_b.py::test_sound"

    def test(_: Tree, files: list[str], *, without: Sequence[str] = (), **__: object) -> Run:
        by = sound if sound in files or flaky in without else "" if flaky in files else flaky
        return Run(not by, False, by, [], "")

    monkeypatch.setattr(Tree, "build", lambda _: "")
    monkeypatch.setattr(Tree, "test", test)
    judge = Judge(ROOT, tmp_path, Console(), Ledger(tmp_path / "results"), verify=False)
    judge._baseline = Baseline("", {flaky: 1, sound: 1})
    mutant = Mutant("an id", "tmemd/sizes.py", Fault("condition", "f", 1, ()))
    assert judge._verdict(Tree(ROOT, ROOT, threading.Event()), mutant) == (ledger.CAUGHT, sound)


def test_a_mutant_is_gone_after_its_run(tree: Tree, tmp_path: Path) -> None:
    before = (tmp_path / "test_it.py").stat().st_mtime_ns
    with tree.with_file("test_it.py", b"def test_it(): assert True\n"):
        assert tree.test(["test_it.py"], first=[], limits={}, limit=60, total=60).passed
    assert (tmp_path / "test_it.py").read_text() == TESTS
    assert (tmp_path / "test_it.py").stat().st_mtime_ns == before


def test_what_was_compiled_of_a_mutant_is_gone_too(tree: Tree, tmp_path: Path) -> None:
    source, *built = (
        tmp_path / name for name in ("tmemd/core/a.c", "tmemd/binding/_core.so", "build/plain/lib/_core.so")
    )
    for path in (source, *built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with tree.with_file("tmemd/core/a.c", b"int x;"):
        assert not any(path.exists() for path in built)
        for path in built:
            path.touch()
    assert not any(path.exists() for path in built)
