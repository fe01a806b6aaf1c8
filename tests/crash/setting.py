# SPDX-License-Identifier: BSD-3-Clause
"""What kind of device the crash tests are about, and where its file lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.crash.history import SIZE
from tests.support.harness import MIB
from tmemd.device.config import MAX_LEASE, DeviceConfig, Uri
from tmemd.store import tail

BACKING, BITMAP, OVERFLOW = "backing", "backing.map", "overflow"  # files
TIMEOUT = 40.0  # seconds, of the fast clock of recorder.c


@dataclass(frozen=True)
class Setting:
    """A device's kind."""

    durable: bool = False
    lost_zero: bool = False
    source: bool = False  # a cache device: the file is its source
    inside: bool = False  # the bitmap is in the file's tail
    vhost: bool = False  # requests come by the virtio door
    far: bool = False  # an NBD server on another host has the file
    fua: bool = True  # that server knows FUA
    overflow: bool = False  # and a local file takes what is written while it is away

    @property
    def length(self) -> int:
        """Bytes that the file has before there is a device; 0: it is made with that."""
        if not self.far:
            return SIZE if self.source else 0
        return tail.length_for(SIZE) if self.inside else SIZE

    def config(self, files: Path, pools: Path, uri: str) -> DeviceConfig:
        """Of a device whose local files are in *files*; *uri*: where a far one's file is."""
        file = Uri(uri) if self.far else files / BACKING
        if self.source:
            return DeviceConfig(
                "life", SIZE, None, 8 * MIB, pools, source=file, write_through=True, timeout=TIMEOUT, connections=2
            )
        return DeviceConfig(
            "life", SIZE, file, 8 * MIB, pools, bitmap=None if self.inside else files / BITMAP, inside=self.inside,
            lease=MAX_LEASE, durable=self.durable, lost_zero=self.lost_zero, reserve=False, timeout=TIMEOUT,
            connections=2, overflow=files / OVERFLOW if self.overflow else None,
        )  # fmt: skip
