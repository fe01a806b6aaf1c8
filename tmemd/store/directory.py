# SPDX-License-Identifier: BSD-3-Clause
"""The pools of a directory, looked after together: by tmemd and, where no tmemd runs, by tmemctl."""

from __future__ import annotations

import fcntl
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from tmemd.store import poolfile
from tmemd.store.pool import Pool, Stray, pool_path
from tmemd.store.poolfile import PoolError

_FILES_SPARED: Final = 128  # descriptors that pools leave to those who ask about them


def _lock_directory(directory: Path) -> int:
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


class Pools:
    """The pools of one directory.

    Who changes pools controls all of the directory, by a lock on itself: pools' files belong to others, who could lock
    them. With *keep*, as in tmemd, it is held all the time, and every pool found is kept open; without, only for each
    change. While the directory is not the one it was, for its tmpfs was unmounted say, the pools are those kept open.
    """

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        """Raises PoolError where *keep* is wanted and another process controls the directory."""
        self.directory = directory
        self._directory_fd = _lock_directory(directory) if keep else None
        self._kept: dict[str, Pool] = {}
        self._strays: dict[str, str] = {}  # and why they could not be opened
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_SPARED

    def close(self) -> None:
        """Let go of every pool, and of the directory."""
        while self._kept:
            self._kept.popitem()[1].close()
        if self._directory_fd is not None:
            os.close(self._directory_fd)

    def follow_directory(self) -> None:
        """Take what is in the directory's place now for the directory. Raises PoolError where another controls it."""
        if self._directory_fd is not None and self._is_replaced():
            before, self._directory_fd = self._directory_fd, _lock_directory(self.directory)
            os.close(before)

    def check_directory(self) -> None:
        """Raise PoolError while what is in the directory's place is not the directory that the pools are in."""
        if self._is_replaced():
            raise PoolError(f"{self.directory} is not the directory that tmemd keeps pools in: its tmpfs was unmounted")

    def _is_replaced(self) -> bool:
        if self._directory_fd is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._directory_fd), self.directory.stat())
        except OSError:
            return True

    def capacity(self) -> int:
        """How many bytes all pools together can take where they are, whatever the host can spare. Raises PoolError."""
        try:
            status = os.statvfs(self.directory if self._directory_fd is None else self._directory_fd)
        except OSError as error:
            raise PoolError(f"{self.directory}: {error.strerror}") from None
        return status.f_blocks * status.f_frsize or sys.maxsize  # a tmpfs of size=0 has no bound

    def names(self) -> list[str]:
        """The pools there are now. Raises PoolError when the directory cannot be read."""
        if self._is_replaced():
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
        if self._directory_fd is not None:
            yield self._adopt(path)
            return
        with ExitStack() as held:
            if control:
                held.callback(os.close, _lock_directory(self.directory))
            yield held.enter_context(closing(Pool(path)))

    def _adopt(self, path: Path) -> Pool:
        self._forget_if_gone(path.stem)
        pool = self._kept.get(path.stem)
        if pool is None:
            self.check_directory()
            if len(self._kept) >= self._most:
                raise PoolError(f"tmemd cannot look after pool {path.stem}: it may open no more files (LimitNOFILE)")
            pool = self._kept[path.stem] = Pool(path)
        return pool

    def _forget_if_gone(self, name: str) -> None:
        """Close the file if it is no pool any more: until then a removed one keeps its memory."""
        pool = self._kept.get(name)
        if pool and pool.is_replaced() and not self._is_replaced():
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
        self.check_directory()
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
