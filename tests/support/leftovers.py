# SPDX-License-Identifier: BSD-3-Clause
"""What a run that is killed would leave behind: children, mounts, directories that hold memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PREFIX = "tmemd-test-"
_NAME = re.compile(rf"{PREFIX}(?P<pid>\d+)-[A-Za-z0-9_]{{8}}")  # as mkdtemp and mktemp(1) make them
PLACES = [Path(place) for place in ("/dev/shm", "/var/tmp", "/sys/fs/cgroup", "/sys/fs/cgroup/memory")]

_OWN_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def dying_with_us(command: Sequence[str | Path]) -> list[str]:
    """The command, with SIGKILL for it when who started it dies, in whatever way (PR_SET_PDEATHSIG)."""
    return ["setpriv", "--pdeathsig", "KILL", *map(str, command)]


def all_dying_with_us(command: Sequence[str | Path]) -> list[str]:
    """The same in a process namespace of its own: whatever it starts dies with it, detached or traced (root only)."""
    # The first process of a namespace must wait for those that lost their parents, as a shell does.
    return dying_with_us([*_OWN_PROCESSES, "sh", "-c", '"$@"; exit', "sh", *command])


def can_have_all_die() -> bool:
    """Whether `all_dying_with_us` works here."""
    return subprocess.run([*_OWN_PROCESSES, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0


@contextlib.contextmanager
def directory(parent: Path | str) -> Iterator[Path]:
    """A new directory for the length of a with block, which `sweep` removes should we be killed before its end."""
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
    with _locked(path):
        try:
            yield path
        finally:
            _remove(path)


def sweep(places: Iterable[Path] = PLACES) -> None:
    """Remove what runs that were killed left in these *places*; those that go on keep theirs.

    Whatever else there is stays: other names, other users' directories, links, and what has a mount in it.
    """
    mounts = _mount_points()
    for place in places:
        for path in place.resolve().glob(f"{PREFIX}*"):
            name = _NAME.fullmatch(path.name)
            if not name or Path(f"/proc/{name['pid']}").exists() or any(each.is_relative_to(path) for each in mounts):
                continue
            with contextlib.suppress(OSError), _locked(path) as fd:
                if os.fstat(fd).st_uid == os.geteuid():
                    _remove(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a directory's lock: also a container that does not see our process sees that it is in use. Yields it open.

    OSError if it is in use, or no directory.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def _mount_points() -> list[Path]:
    """Where something is mounted (proc_pid_mountinfo(5)); white space stays written in octal."""
    return [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _remove(path: Path) -> None:
    if path.is_relative_to("/sys"):
        path.rmdir()
    else:
        shutil.rmtree(path)


def own_mounts() -> None:
    """From now on what we mount is seen by us and our children alone, and is gone with the last of us (root only)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
