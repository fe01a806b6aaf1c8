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

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

from tmemd.binding import _core
from tmemd.store.poolfile import PoolError
from tmemd.store.tail import Claim, Ownership, Renewal, Request, State, Tail


@dataclass(frozen=True)
class Times:
    """The periods of a lease, in seconds. That of the claim holds for all who look at it."""

    lease: float = 20.0  # this long others see nothing change before they take the device

    @property
    def renewal(self) -> float:
        """Between two renewals."""
        return min(self.lease / 10, 2.0)

    @property
    def fence(self) -> float:
        """From the beginning of a renewal until the owner stops serving: clocks may differ by half of it."""
        return self.lease / 2

    @property
    def settle(self) -> float:
        """From a claim until it is read back; whoever took half as long from reading to writing begins anew."""
        return min(self.lease * 3 / 20, 3.0)


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
        self.asker: UUID | None = None  # who asked us to let go, when the tail was last read
        self._watched: tuple[bytes, float] | None = None  # what was seen while we asked, and since when
        self.looked: float | None = None  # when we last saw that it was not let go for us

    @property
    def epoch(self) -> int:
        """Of our claim."""
        assert self.claim
        return self.claim.epoch

    def create(self, *, trusted: bool) -> None:
        """Make the tail, and have the device; *trusted*: the backing holds zeros.

        Raises HeldError where another makes one at the same time; OSError, PoolError.
        """
        start = self._clock.now()
        claim = self._next_claim(0)
        self._tail.create(claim, trusted=trusted)
        self._settle(claim, start, self.times.settle)
        self._tail.check()  # that it is ours as well

    def take(self) -> None:
        """Claim the next epoch, once the owner has let go, or nothing is seen of him for the whole of his lease.

        Raises HeldError where he is alive, or another was faster; OSError, PoolError.
        """
        if self.looked is not None and self._inherit(self.looked):
            return
        claim = None
        while claim is None:
            found, start = self._wait_until_free()
            settle = max(self._times_of(found).settle, self.times.settle)
            claim = self._write_claim(found, start, settle)
        self._settle(claim, start, settle)
        self._tail.check()  # that nobody has begun to restore the device since we looked

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

    def is_elsewhere(self) -> bool:
        """Whether another has it, and has not let go. Raises OSError, PoolError."""
        found = self._tail.ownership()
        return found.claim.owner != self._owner and not self._is_free(found)

    def ask(self) -> bool:
        """Ask the owner to let go, and tell whether `take` is worth while: he has, or was not seen for a whole lease.

        To be called several times in a lease's settling time. Raises OSError, PoolError.
        """
        start = self._clock.now()
        found = self._tail.ownership()
        if self._is_free(found):
            return True
        if self._watched is None or self._watched[0] != found.seen:
            self._watched = found.seen, start
        lease = max(self._times_of(found).lease, self.times.lease)
        if start - self._watched[1] >= lease:
            return True
        self.looked = start
        if found.request is None or found.request.asker != self._owner:
            self._tail.write_request(Request(found.claim.epoch, self._owner, self._host))
        return False

    def _inherit(self, looked: float) -> bool:
        """Take at once what was let go for us, where that was not to be seen when we looked before.

        False: it was not let go, or this has taken too long, and one must wait.
        """
        start = self._clock.now()
        found = self._tail.ownership()
        settle = self._times_of(found).settle
        if found.heir != self._owner or start - looked > settle:
            return False
        self.claim = self._write_claim(found, start, settle)
        if self.claim is None:
            return False
        self._fence_at(start + self.times.fence)
        self._tail.check()
        return True

    def _write_claim(self, found: Ownership, start: float, settle: float) -> Claim | None:
        """None: it took so long that it may have overwritten the claim of somebody who serves by now."""
        claim = self._next_claim(found.claim.epoch)
        self._tail.write_claim(claim)
        return claim if self._clock.now() - start < settle / 2 else None

    def _next_claim(self, epoch: int) -> Claim:
        return Claim(epoch + 1, self._owner, round(self.times.lease * 1000), int(time.time()), self._host)

    def _settle(self, claim: Claim, start: float, seconds: float) -> None:
        """Of what we wrote from *start* on: wait until nobody can overwrite it any more, and look whose claim it is."""
        self._clock.sleep(seconds)
        self._check(claim)
        self.claim = claim
        self._fence_at(start + self.times.fence)

    def _check(self, claim: Claim) -> None:
        found = self._tail.ownership()
        self.asker = found.request.asker if found.request else None
        if found.claim != claim:
            self.claim = None
            self._fence_at(0)
            raise HeldError(found.claim)

    def poll(self) -> None:
        """Look whether the claim still holds, and who asks us to let go. Raises as `renew` does."""
        assert self.claim
        self._check(self.claim)

    def _fence_at(self, until: float) -> None:
        self._until = until
        self._set_fence(until)

    def _write(self, claim: Claim, state: State, heir: UUID | None = None) -> None:
        at_ms = round(self._clock.now() * 1000)
        self._tail.write_renewal(Renewal(claim.epoch, self._owner, at_ms, state, heir))

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
        assert self.claim
        start = self._clock.now()
        self._write(self.claim, State.HELD)
        self._check(self.claim)
        if self._clock.now() < self._until:
            self._fence_at(start + self.times.fence)
        else:  # somebody who saw nothing of us until now may be about to claim it
            self._settle(self.claim, start, self.times.settle)

    def release(self, heir: UUID | None = None) -> None:
        """Let go of it, if it is ours: to *heir* alone as long as a lease lasts, or to anybody. Raises OSError."""
        self._fence_at(0)
        if self.claim:
            self._write(self.claim, State.RELEASED, heir)
            self.claim = None


class Fence:
    """Passes the lease's fence on to the core, which looks at it also while the device is being opened."""

    def __init__(self) -> None:
        self.word: _core.Fence | None = None  # None: there is no lease
        self._at = 0  # nanoseconds since boot
        self._core: _core.Device | None = None

    def set(self, until: float) -> None:
        """Have no request served from then on, in seconds since boot; 0: nor wait for that, for the lease is lost."""
        self._at = max(int(until * 1e9), 1)
        self.word = self.word or _core.Fence()
        self.word.set(self._at)
        if self._core:
            self._core.put_off(self._at)

    @contextmanager
    def of(self, core: _core.Device) -> Iterator[None]:
        """It is said in this device's pool, too, until the device is closed."""
        if self.word:
            self._core = core
            core.put_off(self._at)
        try:
            yield
        finally:
            self._core = None


class Holder(Protocol):
    """Who serves the device."""

    def patience(self) -> float | None:
        """In seconds, how long who asks for the device may wait to be heard; None: it is not to be had now."""

    def let_go(self, release: Callable[[], None]) -> None:
        """Serve it no more, have everything in the backing, and release it. Raises OSError: it goes on."""


class Keeper:
    """Renews a lease, in a thread of its own: a backing that hangs must hang nothing else."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._holder: Holder | None = None
        self._log: Callable[[str], None] = lambda _: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._renewed = -math.inf

    def start(self, log: Callable[[str], None], holder: Holder | None = None) -> None:
        """Begin, in a thread of this process. *log* is told once of each change; *holder* may be asked to let go."""
        self._log, self._holder = log, holder
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="tmem-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Renew it no more."""
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while self._lease.claim and not self._stop.wait(self._pause()):
            self._tick()

    def _pause(self) -> float:
        patience = self._holder.patience() if self._holder else None
        renewal = self._lease.times.renewal
        return renewal if patience is None else min(patience, renewal)

    def _tick(self) -> None:
        failure = ""
        try:
            self._renew_or_poll()
            failure = self._let_go_if_asked()
        except HeldError as error:
            self._log(f"{error}: nothing is served here any more")
            return
        except (OSError, PoolError) as error:
            failure = f"the lease cannot be renewed ({error}); without that nothing is served"
        if failure and not self._failure:
            self._log(failure)
        elif self._failure and not failure:
            self._log("the lease is renewed again")
        self._failure = failure

    def _renew_or_poll(self) -> None:
        now = time.monotonic()
        if now - self._renewed < self._lease.times.renewal / 2:
            self._lease.poll()
            return
        self._renewed = now
        self._lease.renew()

    def _let_go_if_asked(self) -> str:
        """Returns why not."""
        asker, holder = self._lease.asker, self._holder
        if asker is None or holder is None or holder.patience() is None:
            return ""
        try:
            holder.let_go(lambda: self._lease.release(asker))
        except OSError as error:
            return f"another host asks for the device, and cannot have it ({error})"
        self._log("another host asked for the device, and has it now")
        return ""
