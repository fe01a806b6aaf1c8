# SPDX-License-Identifier: BSD-3-Clause
"""What is done to a device that nobody serves: draining it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from tmemd.device.config import DeviceConfig, parse_place
from tmemd.device.serve import open_device
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError


def drain(pool_path: Path) -> None:
    """Drain a pool into the backing file it was last opened with. Raises PoolError, OSError."""
    with open(pool_path, "rb") as pool:
        identity = poolfile.read_identity(pool.fileno(), pool_path)
        if identity is None:
            return
        limit = poolfile.read_counters(pool.fileno(), pool_path).limit_bytes
    if not identity.has_file:
        raise PoolError(f"{pool_path}: the pool has no backing file to drain to")
    backing = parse_place(identity.backing)
    if isinstance(backing, Path) and not backing.exists():
        raise PoolError(f"{pool_path}: its backing file {identity.backing} is not there")
    config = DeviceConfig(identity.name, identity.size, backing, limit, pool_path.parent, bitmap=Path(identity.bitmap))
    with closing(open_device(config)) as served:
        served.core.drain()
