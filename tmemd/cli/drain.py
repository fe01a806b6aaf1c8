# SPDX-License-Identifier: BSD-3-Clause
"""Drain a pool: move all its pages to the backing file, so that the file alone holds the device.

With a plugin that serves the pool, or without one. Puts are refused meanwhile, and accepted again afterwards: freeze
the pool first to keep it empty. What is said afterwards is what was found in tmem then. Ctrl-C ends the waiting, not
the plugin's work.
"""

from __future__ import annotations

import argparse
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Final

from tmemd.cli import common, work
from tmemd.client import Client
from tmemd.device import offline
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import PoolError

_MOST_SAID: Final = 4096  # bytes, by what runs as another user


add_arguments = common.add_pool


def run(arguments: argparse.Namespace) -> int:
    """Drain it and wait."""
    client = common.client(arguments)
    before = client.pool(arguments.name)
    asked = before.served or before.kind == "ephemeral"  # which is refused, in the words of who is asked
    status = _drain_served(client, before) if asked else _drain_idle(client, before)
    left = status.counters.pages_in_tmem
    if left and status.frozen:
        raise PoolError(f"pool {status.name} was not drained: {left} pages are in tmem still")
    if arguments.json:
        common.print_json(status.flat())
    elif left:
        print(f"{status.name}: drained, but not frozen: its guest has put {left} pages in tmem again")
    else:
        print(f"{status.name}: drained of {before.counters.pages_in_tmem} pages, none is in tmem")
    return 0


def _drain_served(client: Client, before: PoolStatus) -> PoolStatus:
    total = before.counters.pages_in_tmem
    return work.do(client, before.name, "drain", done=lambda now: total - now.counters.pages_in_tmem, total=total)


def _drain_idle(client: Client, before: PoolStatus) -> PoolStatus:
    if before.error:
        raise PoolError(before.error)
    if not before.has_file:
        raise PoolError(f"pool {before.name} has no backing file to drain to")
    if os.geteuid() == before.uid:
        _drain_here(Path(before.path))
    else:
        _drain_as_owner(before)
    return client.pool(before.name)


def _drain_here(path: Path) -> None:
    try:
        offline.drain(path)
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or error}") from None


def _drain_as_owner(status: PoolStatus) -> None:
    """Run this command as the pool's user, who also says where the backing file is: root must not believe that.

    That user may take hold of what runs as him, so it gets nothing of ours: no terminal, into which it could type, no
    descriptors, no environment.
    """
    try:
        user = pwd.getpwuid(status.uid)
    except KeyError:
        raise PoolError(f"pool {status.name} belongs to user {status.uid}, who has no account") from None
    path = Path(status.path)
    command = [sys.executable, "-P", "-m", "tmemd.cli", "drain", f"--pools={path.parent}", "--", status.name]
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    try:
        with subprocess.Popen(
            command, user=user.pw_uid, group=user.pw_gid, extra_groups=groups, cwd="/", env={"PATH": os.defpath},
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stderr
            said = process.stderr.read(_MOST_SAID).decode(errors="replace")
    except PermissionError:
        raise PoolError(f"pool {status.name} belongs to {user.pw_name}: run this as that user or as root") from None
    for line in said.splitlines():
        print(common.printable(line), file=sys.stderr)
    if process.returncode:
        raise PoolError(f"pool {status.name} was not drained")
