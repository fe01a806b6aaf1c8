# SPDX-License-Identifier: BSD-3-Clause
"""Judging mutants: the tests that may notice them, in the order in which they are likely to."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from tests.mutants import ledger
from tests.mutants.ledger import Ledger, Result, Verdict
from tests.mutants.mutant import Mutant
from tests.mutants.tree import Tree, TreeError, fingerprint

# A test hangs when it takes so many times what it takes alone, and at least a minute: a slow machine is no fault.
PATIENCE: Final = 8
LEAST_LIMIT: Final = 60.0

# Where tests are that look at a part first, and those that never load it.
NEAR: Final = {
    "tmemd/core": ("tests/model/", "tests/core/", "tests/nbd/test_corruption", "tests/crash/"),
    "tmemd/vhost": ("tests/vhost/", "tests/nbd/test_doors"),
    "tmemd/device": (
        "tests/unit/test_backing",
        "tests/nbd/test_bad",
        "tests/crash/test_host",
        "tests/nbd/test_exports",
    ),
    "tmemd/store": (
        "tests/unit/test_pool",
        "tests/unit/test_check",
        "tests/unit/test_ownership",
        "tests/nbd/test_check",
    ),
    "tmemd/governor": ("tests/unit/",),
    "tmemd/daemon": ("tests/unit/", "tests/nbd/test_daemon"),
    "tmemd/settings": ("tests/unit/test_settings", "tests/unit/test_administration"),
}
# Those that see what a rule does to the core, whatever its file.
BY_RULE: Final = {
    "lock-left-out": ("tests/core/",),
    "sync-left-out": ("tests/crash/test_host_death", "tests/model/test_written_through"),
    "mark-left-out": ("tests/crash/test_host_death", "tests/model/test_written_through"),
}
_PAGE_PATH: Final = ("tests/core/", "tests/model/", "tests/crash/")
_WITHOUT_TMEMD: Final = (
    *_PAGE_PATH,
    *(
        f"tests/nbd/test_{name}"
        for name in (
            "bad_configuration", "check", "control", "corruption", "exports", "falling_target", "memory_limits",
            "requests", "serve_script", "slow_disk",
        )
    ),
)  # fmt: skip
BLIND: Final = {
    "tmemd/core": tuple(
        f"tests/unit/test_{name}"
        for name in ("administration", "daemon", "governor", "hostile", "metrics", "policy", "simulate", "top")
    ),
    "tmemd/vhost": ("tests/core/", "tests/unit/", "tests/model/"),
    "tmemd/governor": _WITHOUT_TMEMD,
    "tmemd/daemon": _WITHOUT_TMEMD,
    "tmemd/settings": _PAGE_PATH,
    "tmemd/device": ("tests/core/", "tests/model/test_sanitized"),
    "tmemd/store": ("tests/core/", "tests/model/test_sanitized"),
}
_CLIENTS: Final = "tests/nbd/test_requests.py"
# Badly broken: no process can load these. The tests run them in another process.
CANARIES: Final = (
    ("tmemd/core/codec.c", b"\n__attribute__((constructor)) static void die(void) { __builtin_trap(); }\n", _CLIENTS),
    ("tmemd/device/serve.py", b"\nraise SystemExit(3)\n", _CLIENTS),
    ("tmemd/daemon/start.py", b"\nraise SystemExit(3)\n", "tests/nbd/test_daemon.py"),
)  # fmt: skip


class Baseline(msgspec.Struct, frozen=True):
    """The tests on a tree without a fault."""

    fingerprint: str
    seconds: dict[str, float]  # by test

    def by_file(self) -> Counter[str]:
        """Seconds of each file of tests."""
        files: Counter[str] = Counter()
        for test, seconds in self.seconds.items():
            files[test.partition("::")[0]] += seconds  # type: ignore[assignment]  # it counts seconds
        return files

    def limits(self) -> dict[str, float]:
        """How long each test may take."""
        return {test: max(PATIENCE * seconds, LEAST_LIMIT) for test, seconds in self.seconds.items()}


def order(file: str, rule: str, baseline: Baseline, killers: Counter[str]) -> list[str]:
    """The files of tests for a mutant of *file*: its own first, then near ones; cheap ones, and who caught others."""
    near, blind = (
        tuple(each for part, prefixes in table.items() if file.startswith(part) for each in prefixes)
        for table in (NEAR, BLIND)
    )
    kills = Counter(test.partition("::")[0] for test in killers.elements())
    seconds = baseline.by_file()
    seen = [test for test in seconds if not test.startswith(blind)] if blind else list(seconds)
    own = f"/test_{Path(file).stem}"
    by_rule = BY_RULE.get(rule, ()) if file.startswith("tmemd/core") else ()

    def rank(test: str) -> tuple[bool, bool, float, str]:
        return (
            own not in test and not test.startswith(by_rule),
            not test.startswith(near),
            seconds[test] / (1 + kills[test]),
            test,
        )

    return sorted(seen, key=rank)


class Judge:
    """Tests mutants, each worker in a copy of its own."""

    def __init__(self, root: Path, place: Path, console: Console, known: Ledger, *, verify: bool) -> None:
        """Copy the tree at *root* to below *place*. *verify*: test it as it is before, if that was not done yet."""
        self._root = root
        self._place = place
        self._console = console
        self._known = known
        self._verify = verify
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._trees: list[Tree] = []
        self._tests = fingerprint(self._root, "tests/")
        self._clean: str | None = None
        self._baseline = Baseline("", {})

    def run(self, mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, Result]]:
        """Judge them all; yields each with its result, the known ones first. Raises TreeError."""
        waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Mutant, Result] | BaseException] = queue.SimpleQueue()
        left = 0
        for mutant in mutants:
            result = self._known.of(mutant, hash_of((self._root / mutant.file).read_bytes()), self._tests)
            if result:
                yield mutant, result
            else:
                waiting.put(mutant)
                left += 1
        if not left:
            return
        self._trees = [Tree(self._root, self._place / f"tree-{n}", self._stopping) for n in range(min(jobs, left))]
        try:
            for tree in self._trees:
                tree.prepare()
            self._baseline = self._measure(self._trees[0])
            self._clean = self._trees[0].code()
            for tree in self._trees:
                threading.Thread(target=self._work, args=(tree, waiting, done)).start()
            for _ in range(left):
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stopping.set()
            for tree in self._trees:
                tree.stop()

    def _work(
        self, tree: Tree, waiting: queue.SimpleQueue[Mutant],
        done: queue.SimpleQueue[tuple[Mutant, Result] | BaseException],
    ) -> None:  # fmt: skip
        try:
            while not self._stopping.is_set():
                mutant = waiting.get_nowait()
                result = self._judge(tree, mutant)
                with self._lock:
                    self._known.add(result)
                done.put((mutant, result))
        except queue.Empty:
            pass
        except BaseException as error:  # Ctrl-C among them: the other thread tells it
            done.put(error)

    def _judge(self, tree: Tree, mutant: Mutant) -> Result:
        start = time.monotonic()
        source = (tree.path / mutant.file).read_bytes()
        with tree.with_file(mutant.file, mutant.apply(source)):
            verdict, by = self._verdict(tree, mutant)
        seconds = round(time.monotonic() - start, 1)
        return Result(mutant.id, verdict, by, seconds, hash_of(source), self._tests)

    def _verdict(self, tree: Tree, mutant: Mutant) -> tuple[Verdict, str]:
        is_python = mutant.file.endswith(".py")
        if is_python and not _compiles(tree.path / mutant.file):
            return ledger.INVALID, ""
        if tree.build():  # one of Python, too: the extension of the mutant before is gone
            return ledger.INVALID, ""
        if not is_python and tree.code() == self._clean:
            return ledger.SAME, ""
        with self._lock:
            killers = self._known.killers(mutant)
        limits = self._baseline.limits()
        files = order(mutant.file, mutant.rule, self._baseline, killers)
        first = [test for test, _ in killers.most_common(3)]
        total = LEAST_LIMIT + 2 * PATIENCE * sum(self._baseline.seconds.values())
        doubted: list[str] = []
        while True:
            run = tree.test(files, first=first, without=doubted, limits=limits, limit=LEAST_LIMIT, total=total)
            if run.passed:
                return ledger.SURVIVED, ""
            if run.by not in self._baseline.seconds:  # what fails before a test can begin fails each time
                return ledger.HUNG if run.hung else ledger.CAUGHT, run.by
            again = tree.test([run.by], first=[], limits=limits, limit=LEAST_LIMIT, total=total)
            if not again.passed:
                return ledger.HUNG if again.hung else ledger.CAUGHT, run.by
            doubted.append(run.by)  # a test that fails now and then may have failed for another reason

    def _measure(self, tree: Tree) -> Baseline:
        """How long the tests take without a fault; they must pass, and fail where all is broken. Raises TreeError."""
        path = self._place / "baseline.json"
        now = fingerprint(self._root, "tmemd/", "plugin/", "scripts/", "tests/", "setup.py", "pyproject.toml")
        known = msgspec.json.decode(path.read_bytes(), type=Baseline) if path.exists() else None
        if known and (known.fingerprint == now or not self._verify):
            return known
        self._console.print("testing the tree as it is (minutes)")
        run = tree.test(["tests"], first=[], limits={}, limit=600, total=3600)
        if not run.passed:
            raise TreeError(f"the tree as it is fails {run.by}:\n{run.output}")
        for file, fault, test in CANARIES:
            with tree.with_file(file, (tree.path / file).read_bytes() + fault):
                if error := tree.build():
                    raise TreeError(f"{file}: {error}")
                if tree.test([test], first=[], limits={}, limit=60, total=600).passed:
                    raise TreeError(f"{test} passes although {file} is broken: it tests something else than the copy")
        if error := tree.build():
            raise TreeError(error)
        found = Baseline(now, {note.test: note.seconds for note in run.notes if note.seconds is not None})
        path.write_bytes(msgspec.json.encode(found))
        return found


def _compiles(path: Path) -> bool:
    try:
        compile(path.read_bytes(), path, "exec")
    except SyntaxError:
        return False
    return True


def hash_of(content: bytes) -> str:
    """What a result remembers of a file."""
    return hashlib.sha256(content).hexdigest()[:16]
