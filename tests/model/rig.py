# SPDX-License-Identifier: BSD-3-Clause
"""A core device over files of the test's own: no nbdkit, no locks, no background thread."""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.content import PAGE
from tests.support.harness import MIB
from tmemd.binding import _core
from tmemd.store import poolfile
from tmemd.store.poolindex import State, block_count

PAGES = 1024  # of the `rig` that modules without one of their own have
REGION = 16 * MIB
OpenDevice = Callable[..., "Rig"]  # the fixture `core_device`
_MAP = struct.Struct("<8sIIQQ16s16sQ")


class Rig:
    """A pool file, a backing file and a map, and the one `Device` that serves them now."""

    _is_cache = False
    prefetch = "no"  # from the next attach on

    def __init__(self, pools: Path, disk: Path | None, size: int, limit: int, *, durable: bool = False) -> None:
        self.pool, self.disk, self.size, self.limit, self._durable = pools / "rig.pool", disk, size, limit, durable
        self._abandoned: list[_core.Device] = []
        self.pool_fd = self._create_pool()
        self._file_fd, self._map_fd = self._create_disk(disk) if disk else (-1, -1)
        self.device = self._open()

    def _create_pool(self) -> int:
        fd = os.open(self.pool, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        layout = _core.layout(self.size)
        self.minimum = layout.minimum_bytes
        self.identity = poolfile.Identity(
            "rig", self.size, layout.index_offset, layout.data_offset, layout.data_bytes, uuid.uuid4(), uuid.uuid4(), 1,
            self.disk is not None, is_ephemeral=self._is_cache,
        )  # fmt: skip
        self._format_pool(fd)
        return fd

    def _format_pool(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, self.identity.file_bytes)
        os.posix_fallocate(fd, 0, self.identity.index_offset)
        os.pwrite(fd, self.identity.pack(), 0)

    def _create_disk(self, disk: Path) -> tuple[int, int]:
        file_fd = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(file_fd, self.identity.pages * PAGE)
        map_fd = os.open(f"{disk}.map", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        header = _MAP.pack(
            b"TMEMMAP1", 1, 0, self.size, REGION, self.identity.uuid.bytes, self.identity.boot_id.bytes, 1
        )
        header += struct.pack("<I", _core.crc32c(header))
        os.pwrite(map_fd, header.ljust(2 * PAGE, b"\0"), 0)
        return file_fd, map_fd

    def _open(self) -> _core.Device:
        return _core.Device(
            self.pool_fd, self._file_fd, self._map_fd, name="rig", size=self.size, limit=self.limit, region=REGION,
            file_bytes=self.identity.pages * PAGE if self.disk else 0, direct=False, lost_zero=False,
            durable=self._durable, cgroup=[], prefetch=self.prefetch,
        )  # fmt: skip

    def reattach(self, *, clean: bool) -> None:
        """Serve the same files anew; unless *clean* the device before is left as SIGKILL would leave it."""
        if clean:
            self.device.close()
        else:
            self._abandoned.append(self.device)
        self.device = self._open()

    def make_file_read_only(self) -> None:
        """From the next attach on every write to the backing file fails."""
        self._reopen(os.O_RDONLY)

    def make_file_writable(self) -> None:
        """From the next attach on they succeed again."""
        self._reopen(os.O_RDWR)

    def make_syncs_fail(self) -> None:
        """From the next attach on writes to the backing file seem to succeed, but no sync does."""
        self._reopen(os.O_RDWR, Path("/dev/null"))

    def make_durable(self, durable: bool) -> None:
        """From the next attach on the device is durable, or is not any more."""
        self._durable = durable

    def _reopen(self, mode: int, path: Path | None = None) -> None:
        assert self.disk is not None
        os.close(self._file_fd)
        self._file_fd = os.open(path or self.disk, mode)

    def close(self) -> None:
        """Close everything, abandoned devices included."""
        for device in [*self._abandoned, self.device]:
            device.close()
        for fd in (self.pool_fd, self._file_fd, self._map_fd):
            if fd >= 0:
                os.close(fd)

    def counters(self) -> poolfile.Counters:
        """The counters page."""
        return poolfile.read_counters(self.pool_fd, self.pool)

    def target(self, nbytes: int) -> None:
        """Set the target."""
        poolfile.write_target(self.pool_fd, nbytes)

    def frozen(self, frozen: bool) -> None:
        """Freeze or thaw."""
        poolfile.write_frozen(self.pool_fd, frozen)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """One write request."""
        _core.pwrite(self.device, data, offset, flags)

    def read(self, offset: int, length: int) -> bytes:
        """One read request."""
        buffer = bytearray(length)
        _core.pread(self.device, buffer, offset, 0)
        return bytes(buffer)


class CacheRig(Rig):
    """The same for a cache device, whose source has its content already; there is no map."""

    _is_cache = True

    def __init__(self, pools: Path, source: Path, limit: int, *, write: bool) -> None:
        self._write = write
        super().__init__(pools, source, source.stat().st_size, limit)

    def _format_pool(self, fd: int) -> None:
        super()._format_pool(fd)
        os.pwrite(fd, bytes([State.FILE]) * block_count(self.size), poolfile.STATES_OFFSET)

    def _create_disk(self, disk: Path) -> tuple[int, int]:
        return os.open(disk, os.O_RDWR if self._write else os.O_RDONLY), -1

    def _open(self) -> _core.Device:
        return _core.Device(
            self.pool_fd, self._file_fd, -1, name="rig", size=self.size, limit=self.limit, region=REGION,
            file_bytes=self.size, direct=False, lost_zero=False, durable=False, ephemeral=True,
            read_only=not self._write, cgroup=[], prefetch=self.prefetch,
        )  # fmt: skip

    def reattach(self, *, clean: bool = True, damage: Callable[[], object] = lambda: None) -> None:
        """Serve the same pool anew, once *damage* was done to it. What waits to be put is lost, as by SIGKILL."""
        assert clean, "of two that put copies neither could be told the other's"
        self.device.close()
        damage()
        self.device = self._open()

    def drop_pool(self) -> None:
        """Serve the source with a new pool, as who finds it changed does."""
        self.reattach(damage=lambda: self._format_pool(self.pool_fd))


@contextlib.contextmanager
def writes_end_at(offset: int) -> Iterator[None]:
    """For the length of a with block whatever this process writes ends at *offset* of its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (offset, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
