# SPDX-License-Identifier: BSD-3-Clause
"""Devices that are defined on this host, beside the pools that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from tmemd.cli import common
from tmemd.definitions import inventory
from tmemd.definitions.definition import NO_BACKING
from tmemd.definitions.inventory import Device
from tmemd.protocol import PoolStatus
from tmemd.store.poolfile import Counters, PoolError

_NOTHING: Final = Counters(*(0 for _ in Counters.__struct_fields__))


def with_devices(pools: Sequence[PoolStatus]) -> list[PoolStatus]:
    """The pools, and the devices that have none now; each says what its device's service is."""
    try:
        devices = {device.name: device for device in inventory.devices()}
    except (PoolError, OSError) as error:
        common.warn(f"what is defined here is not known: {error}")
        return list(pools)
    there = [
        msgspec.structs.replace(status, service=devices[status.name].state) if status.name in devices else status
        for status in pools
    ]
    away = devices.keys() - {status.name for status in pools}
    return [*there, *(_away(devices[name]) for name in sorted(away))]


def _away(device: Device) -> PoolStatus:
    has_backing = device.backing not in ("", NO_BACKING)
    return PoolStatus(
        name=device.name, path="", uid=0, size=device.size or 0, has_file=bool(device.source) or has_backing,
        backing=device.backing if has_backing else "", source=device.source, target_bytes=0, frozen=False, served=False,
        error=None, counters=_NOTHING, unfinished=True, kind="ephemeral" if device.source else "persistent",
        service=device.state,
    )  # fmt: skip
