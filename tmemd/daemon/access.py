# SPDX-License-Identifier: BSD-3-Clause
"""Who asks tmemd for something, and who may have it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from tmemd import protocol
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
                f" start tmemd with --allow-user={peer.uid}, or the plugin in a group of --allow-group"
            )

    def may_see(self, owner: int | None, uid: int) -> bool:
        """Whether *uid* may know of a pool of *owner* (None: of what is of no pool)."""
        return owner in {None, uid} or self.is_admin(uid)
