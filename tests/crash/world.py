# SPDX-License-Identifier: BSD-3-Clause
"""A host with a disk and one device, whose lives and deaths are judged."""

from __future__ import annotations

import pickle
import random
import shutil
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

from tests.crash.history import PAGES, Step
from tests.crash.life import FAILED_TO_OPEN, open_life, read_page
from tests.crash.record import build_recorder, recording
from tests.crash.replay import Disk, Entry, Operation, parse
from tests.crash.truth import Kind, Truth, describe
from tests.support.harness import ROOT


class World:
    """Processes live a device one after the other, each a part of a history, on one disk and one boot of the host.

    After each operation on the disk the host may die: what any *samples* of the outcomes leave is judged on a host that
    has booted anew, without changing this one.
    """

    def __init__(
        self,
        base: Path,
        seed: int,
        *,
        durable: bool = False,
        lost_zero: bool = False,
        samples: int = 1,
        vhost: bool = False,
        inside: bool = False,
    ) -> None:
        """With *vhost* requests come by the virtio door; *inside*: the map is in the file's tail."""
        self.rng = random.Random(seed)
        self.truth = Truth(durable=durable, lost_zero=lost_zero)
        self.found: Counter[Kind] = Counter()  # pages after the host's death
        self._samples = samples
        options = {"--durable": durable, "--lost-zero": lost_zero, "--vhost": vhost, "--inside": inside}
        self._options = [option for option, given in options.items() if given]
        self._device = {"durable": durable, "lost_zero": lost_zero, "inside": inside}
        self._base, self._files, self._pools = base, base / "files", base / "pools"
        self._afterlife = base / "afterlife"
        for path in (self._files, self._pools):
            path.mkdir()
        self._library = build_recorder(base)
        self._boot = uuid.uuid4()
        self._disk = Disk(self.rng)
        self._born = False
        self.entries: list[Entry] = []  # of the life lived last
        self.ends: Counter[int] = Counter()  # the processes' exit statuses

    def live(self, steps: list[Step], faults: str = "", *, look: bool = False) -> list[Step]:
        """A process lives *steps* until *faults* (crash/recorder.c) kill it; returns the steps after that.

        It reads all pages first when told to *look*, or when nobody has since the host's death.
        """
        record = self._base / "record"
        command = [sys.executable, "-m", "tests.crash.life", *map(str, (self._files, self._pools, self._boot))]
        command += self._options
        if look or self.truth.must_look:
            command.append("--look")
        record.touch()
        process = subprocess.run(
            command, input=pickle.dumps(steps), env=recording(self._library, self._files, record, faults), cwd=ROOT,
            check=False,
        )  # fmt: skip
        self.entries = list(parse(record.read_bytes()))
        record.unlink()
        self.truth.begin(steps)
        for entry in self.entries:
            self._follow(entry)
        self.truth.end()
        self._check_end(process.returncode, faults)
        done = sum(entry.operation is Operation.MARK for entry in self.entries)
        return steps[done:]

    def _check_end(self, status: int, faults: str) -> None:
        allowed = {0}
        if any(entry.operation in (Operation.TORN, Operation.SYNC_FAILED) for entry in self.entries):
            allowed.add(FAILED_TO_OPEN)
        if set(faults) & set("abs"):
            allowed.add(-signal.SIGKILL)
        self.ends[status] += 1
        assert status in allowed, f"the process ended with status {status}"

    def _follow(self, entry: Entry) -> None:
        self._disk.step(entry)
        self.truth.follow(entry)
        self._born |= entry.operation is Operation.MARK
        if self._born and entry.operation is not Operation.FOUND:
            self.judge(self._samples)

    def evict(self) -> None:
        """The page cache lets go of what it need not write, which a failed sync did not write either."""
        for path, file in self._disk.evicted().items():
            if path != self._files:  # the directory was synced, too
                file.write_to(path)

    def host_dies(self) -> None:
        """What the disk may have by now is all that is left."""
        left = self._disk.after_death()
        for path, file in left.items():
            if path != self._files:
                file.write_to(path)
        (self._pools / "life.pool").unlink(missing_ok=True)
        self._boot = uuid.uuid4()
        self._disk = Disk(self.rng, left)
        self.truth.host_dies()

    def judge(self, samples: int) -> None:
        """Judge what this host's death may leave now: so many of the outcomes."""
        for _ in range(samples):
            self._judge_one()

    def _judge_one(self) -> None:
        shutil.rmtree(self._afterlife, ignore_errors=True)
        self._afterlife.mkdir()
        for path, file in self._disk.after_death().items():
            file.write_to(self._afterlife / path.name)
        served = open_life(self._afterlife, self._afterlife, uuid.uuid4(), **self._device)
        try:
            pages = {page: read_page(served.core, page) for page in PAGES}
        finally:
            served.close()
        for page, got in pages.items():
            kind = self.truth.after_death(page, got)
            self.found[kind] += 1
            assert kind is not Kind.WRONG, (
                f"the host died, and page {page} was read as {describe(got)}; {self.truth.allowed(page)}"
            )
