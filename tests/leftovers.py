"""What a run that is killed would leave behind: children, mounts, directories that hold memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = "tmemd-test-"
PLACES = [Path(place) for place in ("/dev/shm", "/var/tmp", "/sys/fs/cgroup", "/sys/fs/cgroup/memory")]

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def dying_with_us(command: Sequence[str | Path]) -> list[str]:
    """The command, with SIGKILL for it when who started it dies, in whatever way (PR_SET_PDEATHSIG)."""
    return ["setpriv", "--pdeathsig", "KILL", *map(str, command)]


def make_directory(parent: Path | str) -> Path:
    """A new directory, which `sweep` removes should we be killed before we do."""
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))


@contextlib.contextmanager
def directory(parent: Path | str) -> Iterator[Path]:
    """The same for the length of a with block."""
    path = make_directory(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def sweep() -> None:
    """Remove what runs that were killed left in `PLACES`; those that go on keep theirs."""
    for place in PLACES:
        for path in place.glob(f"{PREFIX}*"):
            owner = path.name.removeprefix(PREFIX).partition("-")[0]
            if not Path(f"/proc/{owner}").exists():
                _remove(path)


def _remove(path: Path) -> None:
    if not path.is_relative_to("/sys"):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.rmdir()


def own_mounts() -> None:
    """From now on what we mount is seen by us and our children alone, and is gone with the last of us (root only)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
