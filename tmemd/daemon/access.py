# SPDX-License-Identifier: BSD-3-Clause
"""Who asks tmemd for something, and who may have it."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from msgspec import UNSET

from tmemd import protocol
from tmemd.daemonconfig import AccessConfig, Account
from tmemd.store.poolfile import PoolError
from tmemd.system.peer import Credentials

READING: Final = (protocol.List, protocol.Show, protocol.Host, protocol.Events)


@dataclass(frozen=True)
class Access:
    """Who may do what. Administrators (root and tmemd's own user) may do everything."""

    plugin_users: frozenset[int]  # who may attach a plugin
    plugin_groups: frozenset[int] = frozenset()  # or in which groups plugins may run that do

    def is_admin(self, uid: int) -> bool:
        """Whether *uid* may change other users' pools."""
        return uid in {0, os.geteuid()}

    def check(self, request: protocol.Request, peer: Credentials) -> None:
        """Raise PoolError if *peer* may not ask for this; reading is let through and filtered by `may_see`."""
        if self.is_admin(peer.uid) or isinstance(request, READING):
            return
        if not isinstance(request, protocol.Attach):
            raise PoolError("only root and tmemd's own user may change pools")
        if peer.uid not in self.plugin_users and peer.gid not in self.plugin_groups:
            raise PoolError(
                f"user {peer.uid} in group {peer.gid} may not attach:"
                f" name it in access.allow_users of tmemd.toml (--allow-user={peer.uid}), or start the plugin in one of"
                " allow_groups (--allow-group)"
            )

    def may_see(self, owner: int | None, uid: int) -> bool:
        """Whether *uid* may know of a pool of *owner* (None: of what is of no pool)."""
        return owner in {None, uid} or self.is_admin(uid)


def number_of(account: Account, kind: str, find: Callable[[str], int]) -> int:
    """Of a user or group, given by number or name. Raises ValueError."""
    if isinstance(account, int) or (account.isascii() and account.isdigit()):
        return int(account)
    try:
        return find(account)
    except KeyError:
        raise ValueError(f"there is no {kind} {account!r}") from None


uid_of: Final = partial(number_of, kind="user", find=lambda name: pwd.getpwnam(name).pw_uid)
gid_of: Final = partial(number_of, kind="group", find=lambda name: grp.getgrnam(name).gr_gid)


@dataclass(frozen=True)
class Flags:
    """What the command line says of access; None, and nothing: that the configuration holds."""

    group: int | None = None
    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grants:
    """Who may connect and attach, as far as that is known; *wrong* says what of the configuration is not."""

    access: Access
    group: int | None  # whose members may connect; None: nobody's
    wrong: tuple[str, ...] = ()


def grants(flags: Flags, config: AccessConfig) -> Grants:
    """What holds: the command line goes before the configuration, and that before the defaults."""
    wrong: list[str] = []
    usual = list(_usual_group())
    group = _found("access.group", usual if config.group is UNSET else [config.group], gid_of, wrong)
    users = _found("access.allow_users", config.allow_users, uid_of, wrong)
    groups = _found(
        "access.allow_groups", usual if config.allow_groups is UNSET else config.allow_groups, gid_of, wrong
    )
    access = Access(frozenset(flags.users or users), frozenset(flags.groups or groups))
    connects = next(iter(group), None) if flags.group is None else flags.group
    return Grants(access, connects, tuple(wrong))


def _usual_group() -> Iterator[int]:
    """The group tmemd, if there is one, and we may give our socket to it."""
    try:
        gid = grp.getgrnam("tmemd").gr_gid
    except KeyError:
        return
    if os.geteuid() == 0 or gid in os.getgroups():
        yield gid


def _found(key: str, accounts: Iterable[Account], find: Callable[[Account], int], wrong: list[str]) -> list[int]:
    found = []
    for account in accounts:
        try:
            found.append(find(account))
        except ValueError as error:
            wrong.append(f"{key}: {error}")
    return found
