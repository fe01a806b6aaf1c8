# SPDX-License-Identifier: BSD-3-Clause
"""A copy of the tree with an environment of its own, to be broken, built and tested without anybody else seeing it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from tests.mutants.plugin import OPTION, Note, Plan, read_notes

QUICK: Final = ("-m", "not vm")
_OURS: Final = ("tests/mutants/", "tests/vm/")  # no part of what is tested, nor of the quick tests


class TreeError(Exception):
    """A copy cannot be made, or is not what it should be."""


def tracked(root: Path) -> list[str]:
    """The files of a tree that git knows or would add, as they are now. Raises TreeError."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise TreeError(f"{root}: {listed.stderr.strip()}")
    return sorted(name for name in set(listed.stdout.split("\0")) if name and (root / name).is_file())


def fingerprint(root: Path, *prefixes: str) -> str:
    """A hash of the files whose names begin so, as far as the quick tests depend on them."""
    digest = hashlib.sha256()
    for name in tracked(root):
        if name.startswith(prefixes) and not name.startswith(_OURS):
            digest.update(name.encode() + b"\0" + hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """What pytest made of a tree. `by` is the test that failed, or hung, or none could be run."""

    passed: bool
    hung: bool
    by: str
    notes: list[Note]
    output: str


class Tree:
    """The copy. Only one thread uses it, but `stop` may come from any."""

    def __init__(self, root: Path, path: Path, stopping: threading.Event) -> None:
        self.path = path
        self._root = root
        self._stopping = stopping
        self._process: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """Make the copy what the tree is, with its extension built. Raises TreeError."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._copy()
        self._must(["scripts/setup"])
        if error := self.build():
            raise TreeError(f"the tree does not compile:\n{error}")
        self._must([str(self._python), "-m", "compileall", "-q", "tmemd", "plugin", "tests"])

    def _copy(self) -> None:
        names = tracked(self._root)
        for name in names:
            source, copy = self._root / name, self.path / name
            if not copy.exists() or copy.read_bytes() != source.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
            copy.chmod(source.stat().st_mode)
        for folder in {Path(name).parts[0] for name in names if "/" in name}:
            for path in (self.path / folder).rglob("*"):
                made = path.suffix in {".pyc", ".so"} or path.is_dir()
                if not made and str(path.relative_to(self.path)) not in names:
                    path.unlink()

    @property
    def _python(self) -> Path:
        return self.path / ".venv" / "bin" / "python"

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        return kept | {
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",  # two mutants of one length in one second would look the same
            "CI": "1",  # no verdict by chance
        }

    def _must(self, command: Sequence[str]) -> None:
        code, output = self._run(command, None)
        if code:
            raise TreeError(f"{self.path}: {' '.join(command)} failed:\n{output}")

    def _run(self, command: Sequence[str], limit: float | None) -> tuple[int | None, str]:
        """Exit status (None: it took longer) and output. Whatever it started ends with it."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            self._process = subprocess.Popen(
                command, cwd=self.path, env=self._environment(), text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                if self._stopping.is_set():
                    self.stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(limit)
                code = self._process.poll()
            finally:
                self.stop()
                self._process.wait()
            if self._stopping.is_set():
                raise KeyboardInterrupt
            output.seek(0)
            return code, output.read()

    def stop(self) -> None:
        """End what runs in it."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def build(self) -> str:
        """Compile what has changed; returns what the compiler said if it failed."""
        code, output = self._run([str(self._python), "setup.py", "-q", "build_ext", "--inplace"], None)
        return (output or "it failed") if code else ""

    def code(self) -> str:
        """A hash of the extension's instructions and data, without its symbols and line numbers."""
        (extension,) = (self.path / "tmemd/binding").glob("*.so")
        with tempfile.NamedTemporaryFile() as stripped:
            strip = ["objcopy", "--strip-all", "--remove-section=.note.gnu.build-id", str(extension), stripped.name]
            subprocess.run(strip, check=True)
            return hashlib.sha256(Path(stripped.name).read_bytes()).hexdigest()

    @contextlib.contextmanager
    def with_file(self, file: str, content: bytes) -> Iterator[None]:
        """Another content for a file, for the length of a with block."""
        path = self.path / file
        original, times = path.read_bytes(), path.stat()
        self._write(path, content)
        try:
            yield
        finally:
            self._write(path, original)
            if path.suffix == ".py":
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # it was compiled when it was copied

    def _write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        if path.suffix != ".py":  # setuptools looks at whole seconds to see what is newer
            for extension in (*self.path.glob("tmemd/binding/*.so"), *self.path.glob("build/**/*.so")):
                extension.unlink()

    def test(
        self, files: Sequence[str], *, first: Sequence[str], without: Sequence[str] = (),
        limits: dict[str, float], limit: float, total: float,
    ) -> Run:  # fmt: skip
        """Run tests until one fails: files in that order, *first* before all, not *without*. Limits in seconds."""
        with tempfile.TemporaryDirectory(prefix="tmemd-mutant-") as scratch:
            notes, plan = Path(scratch) / "notes", Path(scratch) / "plan"
            plan.write_bytes(msgspec.json.encode(Plan(str(notes), list(files), list(first), limits, limit)))
            options = ["-p", "no:cacheprovider", "-p", "tests.mutants.plugin", OPTION, str(plan)]
            options += [f"--deselect={test}" for test in without]
            command = ["-m", "pytest", "-x", "-q", "--tb=short", *options, f"--basetemp={scratch}/t", *QUICK, *files]
            code, output = self._run([str(self._python), *command], total)
            return _judge(code, read_notes(notes), output)


def _judge(code: int | None, notes: list[Note], output: str) -> Run:
    failed = [note.test for note in notes if note.failed]
    ended = {note.test for note in notes if note.seconds is not None}
    unended = [note.test for note in notes if note.test not in ended]
    by = (failed or unended or ["no test could begin"])[0]
    hung = code is None or (code > 0 and not failed and bool(unended))  # a crash ends it by a signal
    return Run(code == 0, hung, "" if code == 0 else by, notes, output)
