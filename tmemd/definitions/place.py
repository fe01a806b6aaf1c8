# SPDX-License-Identifier: BSD-3-Clause
"""Where on the host everything of a defined device is. One root stands before all of it, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tmemd.protocol import DEFAULT_POOLS, DEFAULT_SOCKET
from tmemd.store.poolfile import SUFFIX, PoolError
from tmemd.system.locks import open_lock_file

ROOT_VARIABLE: Final = "TMEMD_ROOT"


@dataclass(frozen=True)
class Place:
    """The paths of a host below *root*."""

    root: Path = Path("/")

    @classmethod
    def of_environment(cls) -> Place:
        """By $TMEMD_ROOT; without it, this host."""
        return cls(Path(os.environ.get(ROOT_VARIABLE) or "/").absolute())

    def below(self, path: str | Path) -> Path:
        """An absolute path of the host."""
        return self.root / str(path).lstrip("/")

    @property
    def definitions(self) -> Path:
        """The directory of all definitions."""
        return self.below("etc/tmemd")

    def definition(self, name: str) -> Path:
        """The definition of a device, as its unit reads it."""
        return self.definitions / f"{name}.conf"

    def home(self, name: str) -> Path:
        """The device's own directory on disk, which is its user's."""
        return self.below("var/lib/tmemd-devices") / name

    @property
    def runtime(self) -> Path:
        """The directory of all sockets."""
        return self.below("run/tmemd-devices")

    def socket(self, name: str) -> Path:
        """Where the device is found by NBD."""
        return self.runtime / f"{name}.sock"

    def vhost_directory(self, name: str) -> Path:
        """Where the device's user may listen, for those who are in the group of QEMU."""
        return self.runtime / name

    def vhost(self, name: str) -> Path:
        """Where the device is found by virtio, if it has that door."""
        return self.vhost_directory(name) / "vhost.sock"

    def pid_file(self, name: str) -> Path:
        """What says, without systemd, which process serves the device."""
        return self.runtime / f"{name}.pid"

    def log(self, name: str) -> Path:
        """What that process says."""
        return self.below("var/log/tmemd-devices") / f"{name}.log"

    def drop_in(self, name: str) -> Path:
        """What the device's unit needs besides."""
        return self.below(f"etc/systemd/system/tmemd-device@{name}.service.d/tmemctl.conf")

    def pool(self, name: str) -> Path:
        """The device's pool."""
        return self.pools / f"{name}{SUFFIX}"

    @property
    def pools(self) -> Path:
        """The directory of tmemd's pools."""
        return self.below(DEFAULT_POOLS)

    @property
    def tmemd(self) -> Path:
        """Where tmemd listens."""
        return self.below(DEFAULT_SOCKET)

    @property
    def has_systemd(self) -> bool:
        """Whether systemd looks after services (sd_booted(3))."""
        return self.below("run/systemd/system").is_dir()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Be the only one who changes what is defined here; waits for another. Raises PoolError."""
        if os.geteuid() != 0:
            raise PoolError("devices are made and looked after by root: run this as root")
        self.runtime.mkdir(parents=True, exist_ok=True)
        fd = open_lock_file(self.runtime / ".lock", wait=True)
        try:
            yield
        finally:
            os.close(fd)
