# SPDX-License-Identifier: BSD-3-Clause
"""Whoever has the lease has it alone: hosts that are stopped, killed, slow and late, on a clock of their own.

Set WORLDS to look at more of them: of a rule left out, some are seen in one world of a thousand only.
"""

from __future__ import annotations

import heapq
import os
import random
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.support.tails import SIZE, MemoryStore, new_tail
from tmemd.device.lease import Clock, HeldError, Lease, Times
from tmemd.store.tail import Tail

TIMES = Times(20.0)
WORLDS = -(-int(os.environ.get("WORLDS", "200")) // 4)  # in each batch


class KilledError(BaseException):
    """The process is no more."""


class Scheduler:
    """Threads that run one at a time, in the order of a clock that nobody waits for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, int, threading.Event]] = []
        self._count = 0
        self._turn = threading.Event()
        self._errors: list[BaseException] = []

    def sleep(self, seconds: float) -> None:
        mine = threading.Event()
        self._count += 1
        heapq.heappush(self._waiting, (self.now + seconds, self._count, mine))
        self._turn.set()
        mine.wait()

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            self.sleep(0)
            try:
                work()
            except KilledError:
                pass
            except BaseException as error:
                self._errors.append(error)
            self._turn.set()

        self._turn.clear()
        threading.Thread(target=run, daemon=True).start()
        self._turn.wait()

    def run(self) -> None:
        """Until nobody waits any more."""
        while self._waiting and not self._errors:
            self.now, _, event = heapq.heappop(self._waiting)
            self._turn.clear()
            event.set()
            self._turn.wait()
        if self._errors:
            raise self._errors[0]


class SlowStore(MemoryStore):
    """What it does takes a while, sometimes for ever; a write of who is killed is torn, or was not done."""

    def __init__(self, shared: MemoryStore, host: Host) -> None:
        self.data = shared.data
        self._host = host

    def read(self, offset: int, length: int) -> bytes:
        self._host.pause()
        data = super().read(offset, length)
        self._host.pause()
        return data

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        try:
            self._host.pause()
        except KilledError:
            whole = self._host.world.rng.choice([0, 512, len(data) // 2])
            super().write(offset, data[:whole], durable=durable)
            raise
        super().write(offset, data, durable=durable)
        self._host.pause()


@dataclass
class World:
    """Hosts that want one device."""

    rng: random.Random
    scheduler: Scheduler = field(default_factory=Scheduler)
    store: MemoryStore = field(default_factory=lambda: MemoryStore(bytearray(SIZE)))
    until: dict[uuid.UUID, float] = field(default_factory=dict)  # the fence of each process that lives
    served: int = 0  # how often somebody began to
    inherited: int = 0  # of these, without waiting
    ends: set[str] = field(default_factory=set)

    def set_fence(self, owner: uuid.UUID, until: float) -> None:
        now = self.scheduler.now
        if until > now:
            others = {other: end for other, end in self.until.items() if other != owner and end > now}
            assert not others, f"at {now} {owner} serves until {until} beside {others}"
            self.served += self.until.get(owner, 0) <= now
        self.until[owner] = until


class Host(Clock):
    """One that tries to have the device, and comes back when it was killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.owner = uuid.UUID(int=world.rng.getrandbits(128))
        self._dies_at = 0.0
        self._fence = 0.0  # that its pool remembers

    def set_fence(self, until: float) -> None:
        self._fence = until
        self.world.set_fence(self.owner, until)

    def now(self) -> float:
        return self.world.scheduler.now

    def sleep(self, seconds: float) -> None:
        """Or longer, for the process is stopped."""
        rng = self.world.rng
        stopped = rng.uniform(0, 3 * TIMES.lease) if rng.random() < 0.02 else 0.0
        self.world.scheduler.sleep(seconds + stopped)
        if self.now() > self._dies_at:
            raise KilledError

    def pause(self) -> None:
        """For a moment, as long as a request may take."""
        rng = self.world.rng
        self.sleep(rng.choice([0.001, 0.001, 0.1, TIMES.settle / 2]) * rng.random())

    def live(self) -> None:
        """Several processes, one after the other; the pool of the one before is mostly there."""
        epoch = 0
        for _ in range(4):
            self._dies_at = self.now() + self.world.rng.expovariate(1 / 60)
            if self.world.rng.random() < 0.2:  # the host boots, and its pool is gone
                self.owner, self._fence, epoch = uuid.UUID(int=self.world.rng.getrandbits(128)), 0, 0
            tail = Tail(SlowStore(self.world.store, self), self.world.store.identity)
            lease = Lease(tail, self.owner, "host", self.set_fence, times=TIMES, clock=self)
            try:
                epoch = self._attach(lease, epoch)
                self._serve(lease)
                self.world.ends.add("released")
            except KilledError:
                self.world.ends.add("killed")
            except HeldError:
                self.world.ends.add("refused")
            self.world.until.pop(self.owner, None)
            self.world.scheduler.sleep(self.world.rng.choice([0.0, 1.0, 15.0, 40.0]))

    def _attach(self, lease: Lease, epoch: int) -> int:
        if lease.resume(epoch, self._fence):
            self.world.ends.add("resumed")
        else:
            if self.world.rng.random() < 0.6:
                self._stand_by(lease)
            lease.take()
            self.world.inherited += lease.looked is not None and self.now() - lease.looked < TIMES.settle
        assert lease.claim
        return lease.claim.epoch

    def _stand_by(self, lease: Lease) -> None:
        while not lease.ask():
            self.sleep(self.world.rng.choice([0.1, 0.1, 2 * TIMES.settle]))

    def _serve(self, lease: Lease) -> None:
        for _ in range(self.world.rng.choice([0, 20, 40])):
            lease.renew()
            if lease.asker and self.world.rng.random() < 0.8:
                break
            self.sleep(TIMES.renewal)
        lease.release(lease.asker)


@pytest.mark.parametrize("batch", range(4))
def test_no_two_hosts_ever_serve_at_the_same_time(batch: int) -> None:
    ends: set[str] = set()
    served = inherited = 0
    for seed in range(batch * WORLDS, (batch + 1) * WORLDS):
        print("seed", seed)
        world = World(random.Random(seed))
        new_tail(world.store)
        for _ in range(4):
            world.scheduler.start(Host(world).live)
        world.scheduler.run()
        ends |= world.ends
        served += world.served
        inherited += world.inherited
    assert ends == {"released", "killed", "refused", "resumed"}
    assert served > 4 * WORLDS
    assert inherited > WORLDS / 20
