# SPDX-License-Identifier: BSD-3-Clause
"""One pool file, and what may be done to it from outside the plugin that serves it.

Pool files belong to the users whose plugins write them, so nothing in them is believed and nothing done to them can
block: opens wait for no lease, nothing is mapped.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing
from pathlib import Path
from typing import Final, Literal

import msgspec

from tmemd.sizes import format_size
from tmemd.store import poolfile, poolindex, requests
from tmemd.store.poolfile import Identity, PoolError
from tmemd.store.poolindex import State
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

    def check_size(self, what: Literal["target", "cap", "minimum"], size: int) -> None:
        """Raise PoolError where the device could not keep to a target, cap or minimum of *size* bytes."""
        identity, counters = self.finished(), poolfile.read_counters(self.fd, self.path)
        least, limit, used = counters.minimum_bytes, counters.limit_bytes, counters.used_bytes
        wrong = ""
        if what == "target" and not least <= size <= limit:
            wrong = f"is outside {least} to {limit} bytes ({format_size(least)} to {format_size(limit)})"
        elif what == "cap" and size < least:
            wrong = f"is below its least, {_both(least)}"
        elif what == "minimum" and size > limit:
            wrong = f"is above its limit, {_both(limit)}"
        elif what != "minimum" and not identity.has_file and size < used:
            wrong = f"is below its use, {_both(used)}, and it has no backing file"
        if wrong:
            raise PoolError(f"pool {self.name}: a {what} of {_both(size)} {wrong}")

    def set_frozen(self, frozen: bool) -> None:
        """Freeze or thaw it. Raises PoolError while it is unfinished."""
        self.finished()
        poolfile.write_frozen(self.fd, frozen)

    def ask(self, request: Request, nbytes: int, choice: Choice) -> int:
        """Ask the serving plugin for work; returns the request's number, 0 for what needed none and is done.

        What was asked for stays so if the plugin dies before it is done: the next one does it. Raises PoolError where
        nobody could do it.
        """
        work, identity = request.name.lower(), self.finished()
        if not identity.has_file and request is not Request.COMPACT:
            raise PoolError(f"pool {self.name} has no backing file to {work} to")
        if identity.is_ephemeral and request is Request.DRAIN:
            raise PoolError(
                f"pool {self.name} is ephemeral, and its source holds all it has: 'tmemctl flush' empties it"
            )
        if identity.is_ephemeral and request in (Request.HANDOVER, Request.HANDBACK):
            raise PoolError(f"pool {self.name} is ephemeral, and needs no handover: its source holds all it has")
        if request is Request.FLUSH:
            if not identity.is_ephemeral:
                raise PoolError(f"pool {self.name} is persistent, and what it has is nowhere else: drain it instead")
            if self.flush():
                return 0
        if not self.is_served():
            raise PoolError(f"nobody serves pool {self.name}, so nobody could {work} it")
        try:
            return requests.ask(self.fd, request, nbytes, choice)
        except PoolError as error:
            raise PoolError(f"pool {self.name}: {error}") from None

    def flush(self) -> bool:
        """Forget all pages of an ephemeral pool; False where it is served, for then it is the plugin's to do.

        Raises PoolError.
        """
        with closing(Pool(self.path)) as owner:  # as in `destroy`
            if not poolfile.lock(owner.fd):
                return False
            identity = self.finished()
            poolindex.check_layout(identity, self.path)
            # In this order: killed in between, no page can be taken for what it is not.
            states = bytes([State.FILE]) * poolindex.block_count(identity.size)
            os.pwrite(owner.fd, states, poolfile.STATES_OFFSET)
            os.ftruncate(owner.fd, identity.index_offset)
            os.ftruncate(owner.fd, identity.file_bytes)
            counters = poolfile.read_counters(owner.fd, self.path)
            poolfile.write_counters(owner.fd, msgspec.structs.replace(
                counters, used_bytes=owner.taken(), pages_in_tmem=0, pages_in_file=identity.pages, payload_bytes=0,
                index_bytes=0,
            ))  # fmt: skip
        return True

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
            identity = self.identity()
            is_held = identity is not None and not identity.is_ephemeral
            pages = poolfile.read_counters(self.fd, self.path).pages_in_tmem if is_held else 0
        except PoolError:
            return "its contents, which cannot be read"
        return f"{pages} pages in tmem" if pages else ""


def _both(size: int) -> str:
    return f"{size} bytes ({format_size(size)})"
