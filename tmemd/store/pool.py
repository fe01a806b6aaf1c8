"""The pools of a directory, and what may be done to each from outside the plugin that serves it.

tmemd and, where no tmemd runs, tmemctl work through this module. Pool files belong to the users whose plugins write
them, so nothing in them is believed and nothing done to them can block: opens wait for no lease, nothing is mapped.
"""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from tmemd import protocol
from tmemd.protocol import PoolStatus
from tmemd.settings import PoolSettings
from tmemd.sizes import format_size
from tmemd.store import poolfile, requests
from tmemd.store.poolfile import Ages, Counters, Identity, Latencies, PoolError
from tmemd.store.requests import Choice, Request

_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WORK: Final[dict[protocol.Work, Request]] = {
    "drain": Request.DRAIN,
    "demote": Request.DEMOTE,
    "settle": Request.SETTLE,
}
_FILES_SPARED: Final = 128  # descriptors that pools leave to those who ask about them
_NO_COUNTERS: Final = Counters(*(0 for _ in Counters.__struct_fields__))


def _counters_of(taken: int) -> Counters:
    """Of a pool that has none: all that is known is how many bytes of RAM it takes."""
    return msgspec.structs.replace(_NO_COUNTERS, used_bytes=taken)


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

    def status(self) -> PoolStatus:
        """What is known of it."""
        return PoolStatus(
            name=self.name, path=str(self.path), uid=self.uid, size=0, has_file=False, backing="", target_bytes=0,
            frozen=False, served=False, error=self.reason, counters=_counters_of(self.taken), taken_bytes=self.taken,
        )  # fmt: skip


def pool_path(directory: Path, name: str) -> Path:
    """Where the pool file of that name lies. Raises PoolError for what is no name."""
    return directory / (protocol.check_name(name) + poolfile.SUFFIX)


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


def _control(directory: Path) -> int:
    """Control the directory until the descriptor returned is closed. Raises PoolError when another process does."""
    fd = None
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if fd is not None:
            os.close(fd)
        if isinstance(error, BlockingIOError):
            reason = f"another process, probably tmemd, controls the pools in {directory}: go through its socket"
        else:
            reason = f"{directory}: {error.strerror}"
        raise PoolError(reason) from None
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

    def status(self, *, long: bool = False) -> PoolStatus:
        """What is known of it, with *long* latencies and ages as well, also while it is unfinished or damaged."""
        try:
            identity = self.identity()
            if identity is None:
                return self._status(None, _counters_of(self.taken()), None)
            counters = poolfile.read_counters(self.fd, self.path)
            latencies = poolfile.read_latencies(self.fd, self.path) if long else None
            ages = poolfile.read_ages(self.fd, self.path) if long else None
        except PoolError as error:
            return self._status(None, _counters_of(self.taken()), str(error))
        return self._status(identity, counters, None, latencies, ages)

    def _status(
        self,
        identity: Identity | None,
        counters: Counters,
        error: str | None,
        latencies: Latencies | None = None,
        ages: Ages | None = None,
    ) -> PoolStatus:
        target = poolfile.read_target(self.fd)
        frozen = poolfile.read_frozen(self.fd)
        limit = counters.limit_bytes
        return PoolStatus(
            name=self.name,
            path=str(self.path),
            uid=self.uid(),
            size=identity.size if identity else 0,
            has_file=identity.has_file if identity else False,
            backing=identity.backing if identity else "",
            target_bytes=limit if target is None else min(target, limit),
            frozen=frozen,
            served=self.is_served(),
            error=error,
            counters=counters,
            taken_bytes=self.taken(),
            unfinished=identity is None and error is None,
            settings=PoolSettings(compression=poolfile.read_compression(self.fd), frozen=frozen),
            freeable_bytes=poolfile.freeable(identity, counters) if identity else 0,
            latencies=latencies,
            ages=ages,
        )

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

    def ask(self, work: protocol.Work, nbytes: int, choice: Choice) -> int:
        """Ask the serving plugin for work; returns the request's number. Raises PoolError where nobody could do it.

        What was asked for stays so if the plugin dies before it is done: the next one does it.
        """
        if not self.finished().has_file and work != "settle":
            raise PoolError(f"pool {self.name} has no backing file to {work} to")
        if not self.is_served():
            raise PoolError(f"nobody serves pool {self.name}, so nobody could {work} it")
        try:
            return requests.ask(self.fd, _WORK[work], nbytes, choice)
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
        status = self.status()
        if status.error:
            return "its contents, which cannot be read"
        return f"{status.counters.pages_in_tmem} pages in tmem" if status.counters.pages_in_tmem else ""


def _both(size: int) -> str:
    return f"{size} bytes ({format_size(size)})"


class Pools:
    """The pools of one directory.

    Who changes pools controls all of the directory, by a lock on itself: pools' files belong to others, who could lock
    them. With *keep*, as in tmemd, it is held all the time, and every pool found is kept open; without, only for each
    change. While the directory is not the one it was, for its tmpfs was unmounted say, the pools are those kept open.
    """

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        """Raises PoolError where *keep* is wanted and another process controls the directory."""
        self.directory = directory
        self._home = _control(directory) if keep else None  # its descriptor
        self._kept: dict[str, Pool] = {}
        self._strays: dict[str, str] = {}  # and why they could not be opened
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_SPARED

    def close(self) -> None:
        """Let go of every pool, and of the directory."""
        while self._kept:
            self._kept.popitem()[1].close()
        if self._home is not None:
            os.close(self._home)

    def move_in(self) -> None:
        """Take what is in the directory's place now for the directory. Raises PoolError where another controls it."""
        if self._home is not None and self._is_away():
            before, self._home = self._home, _control(self.directory)
            os.close(before)

    def check_home(self) -> None:
        """Raise PoolError while what is in the directory's place is not the directory that the pools are in."""
        if self._is_away():
            raise PoolError(f"{self.directory} is not the directory that tmemd keeps pools in: its tmpfs was unmounted")

    def _is_away(self) -> bool:
        if self._home is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._home), self.directory.stat())
        except OSError:
            return True

    def capacity(self) -> int:
        """How many bytes all pools together can take where they are, whatever the host can spare. Raises PoolError."""
        try:
            status = os.statvfs(self.directory if self._home is None else self._home)
        except OSError as error:
            raise PoolError(f"{self.directory}: {error.strerror}") from None
        return status.f_blocks * status.f_frsize or sys.maxsize  # a tmpfs of size=0 has no bound

    def names(self) -> list[str]:
        """The pools there are now. Raises PoolError when the directory cannot be read."""
        if self._is_away():
            return sorted(self._kept)
        try:
            entries = sorted(entry.name for entry in self.directory.iterdir())
        except OSError as error:
            raise PoolError(f"{self.directory}: {error.strerror}") from None
        names = [entry.removesuffix(poolfile.SUFFIX) for entry in entries if entry.endswith(poolfile.SUFFIX)]
        return [name for name in names if poolfile.is_name(name)]

    @contextmanager
    def pool(self, name: str, *, control: bool = False) -> Iterator[Pool]:
        """The pool of that name; *control*: to be changed. Raises PoolError."""
        path = pool_path(self.directory, name)
        if self._home is not None:
            yield self._adopt(path)
            return
        with ExitStack() as held:
            if control:
                held.callback(os.close, _control(self.directory))
            yield held.enter_context(closing(Pool(path)))

    def _adopt(self, path: Path) -> Pool:
        self._forget_if_gone(path.stem)
        pool = self._kept.get(path.stem)
        if pool is None:
            self.check_home()
            if len(self._kept) >= self._most:
                raise PoolError(f"tmemd cannot look after pool {path.stem}: it may open no more files (LimitNOFILE)")
            pool = self._kept[path.stem] = Pool(path)
        return pool

    def _forget_if_gone(self, name: str) -> None:
        """Close the file if it is no pool any more: until then a removed one keeps its memory."""
        pool = self._kept.get(name)
        if pool and pool.is_replaced() and not self._is_away():
            self._kept.pop(name).close()

    def kept(self) -> list[Pool]:
        """Those there were when they were last looked for; open until then."""
        return list(self._kept.values())

    def adopt_all(self, visit: Callable[[Pool], object] = lambda _: None) -> set[str]:
        """Open all pools there are now, *visit* each to change it, and let go of those that are gone.

        Returns the names of those that cannot be used. Raises PoolError.
        """
        for name in list(self._kept):
            self._forget_if_gone(name)
        failed = set()
        self._strays.clear()
        for name in self.names():
            try:
                with self.pool(name, control=True) as pool:
                    visit(pool)
            except (PoolError, OSError) as error:
                failed.add(name)
                if name not in self._kept:
                    self._strays[name] = str(error)
        return failed

    def strays(self) -> list[Stray]:
        """Those that could not be opened when they were last looked for, as they are now."""
        found = (Stray.at(pool_path(self.directory, name), reason) for name, reason in self._strays.items())
        return [stray for stray in found if stray]

    def statuses(self, *, long: bool = False) -> list[PoolStatus]:
        """Every pool's status; those that vanish meanwhile are left out."""
        return [status for name in self.names() if (status := self.status(name, long=long))]

    def status(self, name: str, *, long: bool = False) -> PoolStatus | None:
        """That of one pool, also of one that cannot be opened; None where there is none."""
        try:
            with self.pool(name) as pool:
                return pool.status(long=long)
        except PoolError as error:
            stray = Stray.at(pool_path(self.directory, name), str(error))
            return stray.status() if stray else None

    def destroy(self, name: str, *, lose_pages: bool) -> None:
        """Remove a pool, and let go of its memory. Raises PoolError."""
        with self.pool(name, control=True) as pool:
            pool.destroy(lose_pages=lose_pages)
        self._forget_if_gone(name)

    def owners(self) -> dict[str, int]:
        """Each pool's user, unfinished ones included. Raises PoolError."""
        found = {}
        for name in self.names():
            with suppress(FileNotFoundError):
                found[name] = pool_path(self.directory, name).stat(follow_symlinks=False).st_uid
        return found

    def owner(self, name: str) -> int | None:
        """The user whose pool that is; None: there is none of that name."""
        try:
            return pool_path(self.directory, name).stat(follow_symlinks=False).st_uid
        except OSError:
            return None

    def create(self, name: str, uid: int, gid: int) -> None:
        """Make sure the pool exists and belongs to *uid*. Raises PoolError when it is somebody else's."""
        self.check_home()
        path = pool_path(self.directory, name)
        with suppress(FileExistsError):
            _create_owned(path, uid, gid)
        with self.pool(name) as pool:
            if pool.uid() != uid:
                raise PoolError(f"pool {name} belongs to another user")


def _create_owned(path: Path, uid: int, gid: int) -> None:
    """Create an unfinished pool that belongs to *uid* from its first moment. Raises FileExistsError, PoolError."""
    with ExitStack() as opened:
        try:
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, directory)
            fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, fd)
            # In a full tmpfs nothing is made that could not be told its target.
            os.posix_fallocate(fd, poolfile.CONTROL_OFFSET, poolfile.PAGE)
            os.fchown(fd, uid, gid)
            # Only with a directory does Python call linkat(), which follows the link that leads to a nameless file.
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError as error:
            raise PoolError(f"cannot create {path} for user {uid}: {error.strerror}") from None


def perform(pools: Pools, request: protocol.Request) -> protocol.Answer:
    """Carry out anything but an Attach. Raises PoolError."""
    match request:
        case protocol.List(long):
            return protocol.Listed(pools.statuses(long=long))
        case protocol.Show(name, long, number):
            with pools.pool(name) as pool:
                answer = pool.answer(number) if number else None  # before the status, which is what came of it
                return protocol.Listed([msgspec.structs.replace(pool.status(long=long), answer=answer)])
        case protocol.Set():
            _set(pools, request)
        case protocol.Freeze(name, frozen):
            _freeze(pools, name, frozen)
        case protocol.Ask(name, work, nbytes, min_age, raw_only):
            with pools.pool(name, control=True) as pool:
                return protocol.Asked(pool.ask(work, nbytes, Choice(min_age, raw_only)))
        case protocol.Destroy(name, lose_pages):
            pools.destroy(name, lose_pages=lose_pages)
        case protocol.Attach():
            raise PoolError("only tmemd attaches plugins")
        case protocol.Host():
            raise PoolError("only tmemd looks after the host's memory")
    return protocol.Done()


def _freeze(pools: Pools, name: str | None, frozen: bool) -> None:
    if name is not None:
        with pools.pool(name, control=True) as pool:
            pool.set_frozen(frozen)
    elif failed := pools.adopt_all(lambda pool: pool.set_frozen(frozen)):
        raise PoolError(f"all pools were {'frozen' if frozen else 'thawed'} but {', '.join(sorted(failed))}")


def _set(pools: Pools, request: protocol.Set) -> None:
    """What the pool file itself keeps; the rest only means something to a tmemd."""
    needy = {request.weight, request.cap, request.minimum} != {msgspec.UNSET}
    if needy or request.forget or request.target is None:
        raise PoolError("weight, cap, minimum, defaults and a target of tmemd's own choice need a tmemd")
    with pools.pool(request.name, control=True) as pool:
        if isinstance(request.target, int):
            pool.set_target(request.target)
        if isinstance(request.compression, bool):
            pool.set_compression(request.compression)
