# SPDX-License-Identifier: BSD-3-Clause
"""What a device is told to be."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from tmemd.binding import _core
from tmemd.device.watermark import DEFAULT_PERCENT, MAX_PERCENT
from tmemd.sizes import format_size
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError

SECTOR: Final = 512
POLL_US: Final = 50  # what was measured with others stands in docs/decisions/0013-the-virtio-door.md
MAX_POLL_US: Final = 10_000
MAX_CONNECTIONS: Final = 16
MAX_TIMEOUT: Final = 3600.0
INSIDE: Final = "inside"  # where the bitmap is that is in the backing's tail
LEASE: Final = 20.0  # seconds
MIN_LEASE: Final = 1.0
MAX_LEASE: Final = 3600.0
Debug: TypeAlias = Callable[[str], None]  # where lines for who looks for a fault go


class Uri(str):
    """Of what an NBD server exports, as nbd_connect_uri(3) takes it."""

    __slots__ = ()


def parse_place(text: str) -> Path | Uri:
    """Where a backing or source is: an absolute path, or the URI of an NBD server's export."""
    return Uri(text) if re.match(r"nbds?(\+unix|\+vsock)?:", text) else Path(text).absolute()


@dataclass(frozen=True)
class DeviceConfig:
    """What a device is told to be. Sizes in bytes."""

    name: str
    size: int
    backing: Path | Uri | None  # None: RAM only, or a source
    limit: int | None = None  # None: whatever tmemd's target says
    pools: Path | None = None
    tmemd: Path | None = None  # its socket; None: work alone
    bitmap: Path | None = None  # None: beside the backing file, or in the tail of what is no file
    inside: bool = False  # in the tail of a file, too
    standby: bool = False  # begin although another host has the device, and take it when the first request comes
    lease: float | None = None  # seconds that others leave it to a host that is not seen; None: as is fit
    lost_zero: bool = False
    durable: bool = False
    reserve: bool = True
    shared: bool = False  # any number of clients at a time
    source: Path | Uri | None = None  # of a cache device, which has no backing file
    write_through: bool = False  # a cache device may be written
    vhost: Path | None = None  # the socket of the virtio door
    poll_us: int = POLL_US  # how long that one may watch a queue before it sleeps
    overflow: Path | None = None  # takes what is written while that server is away
    connections: int = 4  # to an NBD server, at most
    timeout: float = 30.0  # seconds that a request to it may take
    prefetch: str = "auto"  # whether pages are fetched ahead of reads: 'yes', 'no', or while a miss takes long
    warm: Path | None = None  # a list of pages to fetch ahead when it begins with nothing in RAM
    watermark: int = DEFAULT_PERCENT  # of the target is kept free for pages to come; 0: refuse when full

    @property
    def file(self) -> Path | Uri | None:
        """Where pages are that are not in tmem."""
        return self.backing or self.source

    @property
    def lease_seconds(self) -> float:
        """How long others leave it to us where they see nothing of us: a server may be away for its time-out."""
        least = 2 * (self.timeout + 5) if isinstance(self.backing, Uri) else 0
        return self.lease or max(LEASE, least)

    @property
    def is_read_only(self) -> bool:
        """Whether nobody may write to it."""
        return self.source is not None and not self.write_through

    def check(self) -> _core.Layout:
        """The layout of its pool. Raises PoolError."""
        if not poolfile.is_name(self.name):
            raise PoolError(f"name={self.name}: {poolfile.NAME_RULE}")
        if self.size <= 0 or self.size % SECTOR:
            where = f"its source has {self.size} bytes, which" if self.source else f"size={self.size}"
            raise PoolError(f"{self.name}: {where} is not a positive multiple of {SECTOR}")
        try:
            layout = _core.layout(self.size)
        except (ValueError, OverflowError):
            raise PoolError(f"{self.name}: size={self.size} is more than 16 TiB") from None
        if self.limit is None and self.tmemd is None:
            raise PoolError(f"{self.name}: say with limit=SIZE how much RAM its pool may take")
        least = layout.minimum_bytes
        if self.limit is not None and self.limit < least:
            raise PoolError(
                f"{self.name}: limit={self.limit} is below the {least} bytes ({format_size(least)}) that a device of"
                " this size needs (2 MiB for each GiB)"
            )
        if not 0 <= self.watermark <= MAX_PERCENT:
            raise PoolError(f"{self.name}: watermark={self.watermark}% is not 0% to {MAX_PERCENT}%")
        if not 0 <= self.poll_us <= MAX_POLL_US:
            raise PoolError(f"{self.name}: poll={self.poll_us} is not 0 to {MAX_POLL_US} us")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise PoolError(f"{self.name}: connections={self.connections} is not 1 to {MAX_CONNECTIONS}")
        if not 0.1 <= self.timeout <= MAX_TIMEOUT:
            raise PoolError(f"{self.name}: timeout={self.timeout:g} is not 0.1 to {MAX_TIMEOUT:g} seconds")
        self._check_files()
        return layout

    def _check_files(self) -> None:
        if self.lease is not None and not MIN_LEASE <= self.lease <= MAX_LEASE:
            raise PoolError(f"{self.name}: lease={self.lease:g} is not {MIN_LEASE:g} to {MAX_LEASE:g} seconds")
        if self.lease is not None and isinstance(self.backing, Uri) and self.lease < 2 * self.timeout:
            raise PoolError(
                f"{self.name}: lease={self.lease:g} is less than twice timeout={self.timeout:g}: what has waited for"
                " the server could reach it when another host has the device already"
            )
        if self.source and (self.backing or self.bitmap or self.durable or self.lost_zero):
            raise PoolError(f"{self.name}: backing=, bitmap=, flush=durable and lost= are not for devices with source=")
        if self.write_through and not self.source:
            raise PoolError(f"{self.name}: write= is for devices with source=; others can always be written")
        if not self.backing and (self.bitmap or self.durable):
            raise PoolError(f"{self.name}: bitmap= and flush=durable need a backing file")
        if self.standby and (self.vhost or not self.backing or self.bitmap):
            raise PoolError(f"{self.name}: standby=yes is for devices with a tail, and not for vhost=")
        if self.inside and (self.bitmap or not self.backing):
            raise PoolError(f"{self.name}: bitmap=inside is for devices with a backing file")
        if self.overflow and not (isinstance(self.backing, Uri) and self.bitmap):
            raise PoolError(
                f"{self.name}: overflow= is for a backing on an NBD server, with bitmap=FILE: what is in it, only this"
                " host has"
            )
        if self.bitmap and self.bitmap == self.backing:
            raise PoolError(f"{self.name}: bitmap= and backing= name the same file")


def default_pools() -> Path:
    """Where the pools go of devices that are told neither pools= nor tmemd=: a directory of the user's own."""
    return Path(f"/dev/shm/tmem-{os.geteuid()}")
