# SPDX-License-Identifier: BSD-3-Clause
"""A command that is run as the user whose pool it is about: root must not believe what that user's files say.

That user may take hold of what runs as him, so it gets nothing of ours: no terminal, into which it could type, no
environment, and no descriptors but those it needs.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tmemd.cli import common
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import AwayError, PoolError

# Debian's package lies where no Python looks.
_ENVIRONMENT: Final = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
_MOST_SAID: Final = 4096  # bytes


def is_us(status: PoolStatus) -> bool:
    """Whether the pool is this process's user's."""
    return os.geteuid() == status.uid


def run(
    status: PoolStatus,
    command: Sequence[str],
    done: str,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> None:
    """Run tmemctl *command* on a pool as its owner, and pass on what it says on standard error.

    Raises PoolError where it was not *done*.
    """
    name, group, groups = _account(status)
    words = [sys.executable, "-P", "-m", "tmemd.cli", command[0], f"--pools={Path(status.path).parent}", *command[1:]]
    try:
        with subprocess.Popen(
            words, user=status.uid, group=group, extra_groups=groups, cwd="/", env=_ENVIRONMENT,
            start_new_session=True, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            said = _listen(process)
    except PermissionError:
        raise PoolError(f"pool {status.name} belongs to {name}: run this as that user or as root") from None
    for line in said.decode(errors="replace").splitlines():
        print(common.printable(line), file=sys.stderr)
    if process.returncode == common.AWAY:
        raise AwayError(f"pool {status.name} was not {done}: its server is away")
    if process.returncode:
        raise PoolError(f"pool {status.name} was not {done}")


def _account(status: PoolStatus) -> tuple[str, int, list[int]]:
    """The owner's name, group and further groups; where he has no account, the group of his pool."""
    try:
        user = pwd.getpwuid(status.uid)
    except KeyError:
        return f"user {status.uid}", Path(status.path).stat().st_gid, []
    return user.pw_name, user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)


def _listen(process: subprocess.Popen[bytes]) -> bytes:
    """What it says, up to a bound. Who interrupts us ends it, too."""
    assert process.stderr
    try:
        return process.stderr.read(_MOST_SAID)
    except BaseException:
        process.kill()
        raise
