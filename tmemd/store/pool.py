"""One pool file, and what may be done to it from outside the plugin that serves it.

Pool files belong to the users whose plugins write them, so nothing in them is believed and nothing done to them can
block: opens wait for no lease, nothing is mapped.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from tmemd.sizes import format_size
from tmemd.store import poolfile, requests
from tmemd.store.poolfile import Counters, Identity, PoolError
from tmemd.store.requests import Choice, Request

_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Stray(msgspec.Struct, frozen=True):
    """A pool file that cannot be opened, and takes RAM all the same."""

    name: str
    path: Path
    uid: int
    taken: int  # bytes of RAM
    reason: str

    @classmethod
    def at(cls, path: Path, reason: str) -> Stray | None:
        """The file there; None where there is none, or something that is no file of one name."""
        try:
            status = path.stat(follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return None
        return cls(path.stem, path, status.st_uid, status.st_blocks * 512, reason)


def pool_path(directory: Path, name: str) -> Path:
    """Where the pool file of that name lies. Raises PoolError for what is no name."""
    return directory / (poolfile.check_name(name) + poolfile.SUFFIX)


def open_pool_file(path: Path, *, writable: bool = True) -> int:
    """An own open file description of a pool file; closing it is the caller's. Raises PoolError."""
    try:
        fd = os.open(path, _OPEN | (os.O_RDWR if writable else os.O_RDONLY))
    except FileNotFoundError:
        raise PoolError(f"there is no pool {path.stem} in {path.parent}") from None
    except BlockingIOError:
        raise PoolError(f"{path}: its owner holds a lease on it, which keeps others from opening it") from None
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror}") from None
    status = os.fstat(fd)
    # A second name is somebody's attempt to have another file taken for a pool.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise PoolError(f"{path}: not a regular file of one name")
    return fd


class Pool:
    """One open pool file."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises PoolError."""
        self.path = path
        self.name = path.stem
        self.fd = open_pool_file(path)

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def is_replaced(self) -> bool:
        """Whether the path leads to another file now, or to none."""
        try:
            now = self.path.stat(follow_symlinks=False)
        except OSError:
            return True
        return not os.path.samestat(now, os.fstat(self.fd))

    def uid(self) -> int:
        """The user the pool belongs to."""
        return os.fstat(self.fd).st_uid

    def is_served(self) -> bool:
        """Whether a plugin serves it."""
        return poolfile.is_locked(self.fd)

    def identity(self) -> Identity | None:
        """What device it belongs to; None while it is unfinished. Raises PoolError."""
        identity = poolfile.read_identity(self.fd, self.path)
        if identity and identity.name != self.name:
            raise PoolError(f"{self.path}: this is the pool of device {identity.name!r}")
        return identity

    def finished(self) -> Identity:
        """Its identity. Raises PoolError while it is unfinished."""
        identity = self.identity()
        if identity is None:
            raise PoolError(f"pool {self.name} is unfinished: no plugin has served it yet")
        return identity

    def taken(self) -> int:
        """Bytes of RAM that its file takes, as the kernel counts them."""
        return os.fstat(self.fd).st_blocks * 512

    def set_target(self, target: int) -> None:
        """Set the target, in bytes. Raises PoolError where the device could not keep to it."""
        self.check_target(target)
        poolfile.write_target(self.fd, target)

    def check_target(self, target: int) -> None:
        """Raise PoolError where the device could not keep to that target, in bytes."""
        counters = self._finished_counters()
        low, high = counters.minimum_bytes, counters.limit_bytes
        if not low <= target <= high:
            raise PoolError(
                f"pool {self.name}: a target of {target} bytes ({format_size(target)}) is outside"
                f" {low} to {high} bytes ({format_size(low)} to {format_size(high)})"
            )
        self._check_use("target", target, counters)

    def check_cap(self, cap: int) -> None:
        """Raise PoolError where the device could not do with *cap* bytes."""
        counters = self._finished_counters()
        if cap < counters.minimum_bytes:
            raise PoolError(
                f"pool {self.name}: a cap of {_both(cap)} is below its least, {_both(counters.minimum_bytes)}"
            )
        self._check_use("cap", cap, counters)

    def check_minimum(self, minimum: int) -> None:
        """Raise PoolError where the device could not take *minimum* bytes."""
        limit = self._finished_counters().limit_bytes
        if minimum > limit:
            raise PoolError(f"pool {self.name}: a minimum of {_both(minimum)} is above its limit, {_both(limit)}")

    def _finished_counters(self) -> Counters:
        self.finished()
        return poolfile.read_counters(self.fd, self.path)

    def _check_use(self, what: str, size: int, counters: Counters) -> None:
        if not self.finished().has_file and size < counters.used_bytes:
            use = _both(counters.used_bytes)
            raise PoolError(f"pool {self.name} has no backing file, so its {what} cannot fall below its use, {use}")

    def set_frozen(self, frozen: bool) -> None:
        """Freeze or thaw it. Raises PoolError while it is unfinished."""
        self.finished()
        poolfile.write_frozen(self.fd, frozen)

    def set_compression(self, compression: bool) -> None:
        """Compress what is put from now on, or store it as it is. Raises PoolError while it is unfinished."""
        self.finished()
        poolfile.write_compression(self.fd, compression)

    def ask(self, request: Request, nbytes: int, choice: Choice) -> int:
        """Ask the serving plugin for work; returns the request's number. Raises PoolError where nobody could do it.

        What was asked for stays so if the plugin dies before it is done: the next one does it.
        """
        work = request.name.lower()
        if not self.finished().has_file and request is not Request.COMPACT:
            raise PoolError(f"pool {self.name} has no backing file to {work} to")
        if not self.is_served():
            raise PoolError(f"nobody serves pool {self.name}, so nobody could {work} it")
        try:
            return requests.ask(self.fd, request, nbytes, choice)
        except PoolError as error:
            raise PoolError(f"pool {self.name}: {error}") from None

    def answer(self, number: int) -> int | None:
        """The errno of a request that was carried out, 0 for success; None: it was not yet.

        Raises PoolError where that is not known any more.
        """
        try:
            return requests.answer_to(self.fd, number)
        except PoolError as error:
            raise PoolError(f"pool {self.name}: {error}") from None

    def destroy(self, *, lose_pages: bool) -> None:
        """Remove the pool file; its memory goes when the last one closes it.

        Raises PoolError while it is served, or would lose pages without *lose_pages*.
        """
        # The owner's lock, on an open file of its own, keeps plugins from attaching to what is about to go.
        with closing(Pool(self.path)) as owner:
            if not poolfile.lock(owner.fd):
                raise PoolError(f"pool {self.name} is served: stop its plugin first")
            loss = self._loss()
            if loss and not lose_pages:
                raise PoolError(f"destroying pool {self.name} would lose {loss}: drain it first, or say --yes")
            self.path.unlink()

    def _loss(self) -> str:
        try:
            pages = poolfile.read_counters(self.fd, self.path).pages_in_tmem if self.identity() else 0
        except PoolError:
            return "its contents, which cannot be read"
        return f"{pages} pages in tmem" if pages else ""


def _both(size: int) -> str:
    return f"{size} bytes ({format_size(size)})"
