# SPDX-License-Identifier: BSD-3-Clause
"""Who may serve a device whose backing several hosts can reach: one owner, for as long as he renews his claim.

It is the delta lease of Chockler and Malkhi, as sanlock has it, with a block of his own for each who writes:

- Whoever takes the device writes the next epoch's claim, waits until anybody who read the tail before him has written
  what he was about to, and reads it back: of two who claimed the same epoch one finds the other's claim, and gives up.
- The owner renews his claim five times as often as he must, and serves for `fence` seconds from the beginning of the
  last renewal that went well. After that every request fails, and so does every write to the backing: the core looks at
  the clock itself, which needs nobody to be awake.
- Others leave the device to him until they have seen nothing change for the whole of his lease, by their own clocks,
  which is longer by half.
- He who lets go says so, and may name an heir, who takes the device at once.

What no lease can do is to stop a write that left in time and arrives too late: docs/operating.md says what can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from tmemd.store.poolfile import PoolError
from tmemd.store.tail import Claim, Ownership, Renewal, State, Tail

LEASE: Final = 20.0  # seconds


@dataclass(frozen=True)
class Times:
    """The periods of a lease, in seconds. That of the claim holds for all who look at it."""

    lease: float = LEASE  # this long others see nothing change before they take the device

    @property
    def renewal(self) -> float:
        """Between two renewals."""
        return self.lease / 10

    @property
    def fence(self) -> float:
        """From the beginning of a renewal until the owner stops serving: clocks may differ by half of it."""
        return self.lease / 2

    @property
    def settle(self) -> float:
        """From a claim until it is read back; whoever took half as long from reading to writing begins anew."""
        return self.lease * 3 / 20


class Clock:
    """Seconds that go on while the host sleeps."""

    def now(self) -> float:
        """Since it booted."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class HeldError(PoolError):
    """Another owner has the device; the message says who, and since when."""

    def __init__(self, claim: Claim) -> None:
        since = datetime.fromtimestamp(claim.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        super().__init__(f"host {claim.host} has the device, since {since} (epoch {claim.epoch})")


class Lease:
    """The right of one owner to serve the device of a tail. One thread at a time may use it."""

    def __init__(
        self,
        tail: Tail,
        owner: UUID,
        host: str,
        set_fence: Callable[[float], None],
        *,
        times: Times | None = None,
        clock: Clock | None = None,
    ) -> None:
        """*owner* names a pool file, and nobody else; *set_fence* has all requests fail from that time on."""
        self._tail = tail
        self._owner = owner
        self._host = host
        self._set_fence = set_fence
        self.times = times or Times()
        self._clock = clock or Clock()
        self._until = 0.0
        self.claim: Claim | None = None  # ours

    def create(self, *, trusted: bool) -> None:
        """Make the tail, and have the device; *trusted*: the backing holds zeros.

        Raises HeldError where another makes one at the same time; OSError, PoolError.
        """
        start = self._clock.now()
        self.claim = self._next_claim(0)
        self._tail.create(self.claim, trusted=trusted)
        self._settle(start, self.times.settle)
        self._tail.check()

    def take(self) -> None:
        """Claim the next epoch, once the owner has let go, or nothing is seen of him for the whole of his lease.

        Raises HeldError where he is alive, or another was faster; OSError, PoolError.
        """
        while True:
            found, start = self._wait_until_free()
            settle = max(self._times_of(found).settle, self.times.settle)
            if self._write_claim(found, start, settle):
                break
        self._settle(start, settle)

    def _wait_until_free(self) -> tuple[Ownership, float]:
        """What was read last, and when that began."""
        start = self._clock.now()
        found = self._tail.ownership()
        seen, lease = found.seen, max(self._times_of(found).lease, self.times.lease)
        since = self._clock.now()
        while not self._is_free(found) and start - since < lease:
            self._clock.sleep(self.times.renewal / 2)
            start = self._clock.now()
            found = self._tail.ownership()
            if found.seen != seen and not self._is_free(found):
                raise HeldError(found.claim)
        return found, start

    def _times_of(self, found: Ownership) -> Times:
        return Times(found.claim.lease_ms / 1000)

    def _is_free(self, found: Ownership) -> bool:
        return found.is_released and found.heir in (None, self._owner)

    def inherit(self, looked: float) -> bool:
        """Take at once what was let go for us, where that was not to be seen when we looked before, at *looked*.

        False: it was not let go, or this has taken too long, and `take` must. Raises OSError, PoolError.
        """
        start = self._clock.now()
        found = self._tail.ownership()
        settle = self._times_of(found).settle
        if found.heir != self._owner or start - looked > settle or not self._write_claim(found, start, settle):
            return False
        self._fence_at(start + self.times.fence)
        return True

    def _write_claim(self, found: Ownership, start: float, settle: float) -> bool:
        """False: it took so long that it may have overwritten the claim of somebody who serves by now."""
        self.claim = self._next_claim(found.claim.epoch)
        self._tail.write_claim(self.claim)
        return self._clock.now() - start < settle / 2

    def _next_claim(self, epoch: int) -> Claim:
        return Claim(epoch + 1, self._owner, round(self.times.lease * 1000), int(time.time()), self._host)

    def _settle(self, start: float, seconds: float) -> None:
        """Of what we wrote from *start* on: wait until nobody can overwrite it any more, and look whose claim it is."""
        self._clock.sleep(seconds)
        self._check()
        self._fence_at(start + self.times.fence)

    def _check(self) -> None:
        claim = self._tail.ownership().claim
        if claim != self.claim:
            self.claim = None
            self._fence_at(0)
            raise HeldError(claim)

    def _fence_at(self, until: float) -> None:
        self._until = until
        self._set_fence(until)

    def _write(self, state: State, heir: UUID | None = None) -> None:
        assert self.claim
        at_ms = round(self._clock.now() * 1000)
        self._tail.write_renewal(Renewal(self.claim.epoch, self._owner, at_ms, state, heir))

    def resume(self, epoch: int, until: float) -> bool:
        """Go on with our claim of *epoch*, where a process before us was fenced from *until* on.

        If that is over, others may take us for dead by now. False: somebody else has claimed it since. Raises
        HeldError where he does so at this moment; OSError, PoolError.
        """
        found = self._tail.ownership()
        if (found.claim.owner, found.claim.epoch) != (self._owner, epoch):
            return False
        self.claim, self.times = found.claim, self._times_of(found)  # by which others go
        self._until = 0 if found.is_released else until
        self.renew()
        return True

    def renew(self) -> None:
        """Renew the claim, and look whether it still holds. Where the fence was reached, that takes until it is sure.

        Raises HeldError where another has the device; PoolError, OSError: the fence comes nearer.
        """
        start = self._clock.now()
        self._write(State.HELD)
        self._check()
        if self._clock.now() < self._until:
            self._fence_at(start + self.times.fence)
        else:  # somebody who saw nothing of us until now may be about to claim it
            self._settle(start, self.times.settle)

    def release(self, heir: UUID | None = None) -> None:
        """Let go of it: to *heir* alone as long as a lease lasts, or to anybody. Raises OSError."""
        self._fence_at(0)
        self._write(State.RELEASED, heir)
        self.claim = None
