# SPDX-License-Identifier: BSD-3-Clause
"""The defined devices as they are now, for those who list them."""

from __future__ import annotations

import msgspec

from tmemd.definitions import services
from tmemd.definitions.definition import Definition, load_all
from tmemd.definitions.place import Place
from tmemd.protocol import ServiceState
from tmemd.store.poolfile import PoolError


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is defined on this host; its pool, if there is one, has its name."""

    name: str
    state: ServiceState  # unfinished: half made or half taken away
    doors: list[str]  # 'nbd', 'vhost'
    socket: str  # where it is found by NBD
    vhost: str | None
    size: int | None  # bytes; None: its source's
    backing: str  # its backing file or disk; 'none'; '' with a source
    source: str
    options: list[str]


def devices(place: Place | None = None) -> list[Device]:
    """All of them, by name. Raises PoolError."""
    place = place or Place.of_environment()
    defined = list(load_all(place))
    states = services.of(place).states([each.name for each in defined])
    return [
        Device(
            name=each.name,
            state="unfinished" if each.is_unfinished else state,
            doors=["nbd", "vhost"] if each.vhost else ["nbd"],
            socket=str(place.socket(each.name)),
            vhost=str(each.vhost) if each.vhost else None,
            size=_size(each),
            backing=each.backing,
            source=each.source,
            options=list(each.options),
        )
        for each, state in zip(defined, states, strict=True)
    ]


def _size(device: Definition) -> int | None:
    """None, too, where somebody has written what is no size."""
    try:
        return device.size_bytes
    except PoolError:
        return None
