"""A device from its configuration to its page path: opens and checks pool, backing file and map, and does their upkeep.

The page path itself is tmemd.core. What decides is here: when to demote, to compact, to age, and what a request of the
control page means.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tmemd import backing as backings
from tmemd import cgroup, mapfile, poolfile
from tmemd.backing import Backing, BackingError
from tmemd.core import _core
from tmemd.mapfile import MapError, MapHeader
from tmemd.poolfile import Counters, Identity, PoolError, Request
from tmemd.sizes import format_size
from tmemd.tmpfs import is_tmpfs

SECTOR: Final = 512
TICK: Final = 0.1  # seconds between two looks at the control page
TICKS_PER_AGE: Final = 100  # sixteen generations of ten seconds tell pages apart for the last few minutes
DEMOTE_STEP: Final = 16 << 20  # bytes demoted in one go, so that other work gets its turn
MOVES_STEP: Final = 20_000  # records compacted in one go, some 20 ms
NO_LIMIT: Final = 1 << 60
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)

DeviceErrors: Final = (BackingError, MapError, PoolError, OSError)


class ConfigError(Exception):
    """A device's configuration makes no sense; the message says which part, and why."""


@dataclass(frozen=True)
class DeviceConfig:
    """What a device is told to be. Sizes in bytes."""

    name: str
    size: int
    backing: Path | None  # None: RAM only
    limit: int | None = None  # None: whatever tmemd's target says
    pools: Path | None = None
    tmemd: Path | None = None  # its socket; None: work alone
    map: Path | None = None  # None: beside the backing file
    lost_zero: bool = False
    durable: bool = False
    reserve: bool = True

    def check(self) -> _core.Layout:
        """The layout of its pool. Raises ConfigError."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name={self.name}: a name is 1 to 63 letters, digits, '_', '.', '-' and begins with a letter or digit"
            )
        if self.size <= 0 or self.size % SECTOR:
            raise ConfigError(f"{self.name}: size={self.size} is not a positive multiple of {SECTOR}")
        try:
            layout = _core.layout(self.size)
        except (ValueError, OverflowError):
            raise ConfigError(f"{self.name}: size={self.size} is more than 16 TiB") from None
        if self.limit is None and self.tmemd is None:
            raise ConfigError(f"{self.name}: say with limit=SIZE how much RAM its pool may take")
        if self.limit is not None and self.limit < layout.minimum_bytes:
            raise ConfigError(
                f"{self.name}: limit={self.limit} is below the {layout.minimum_bytes} bytes"
                f" ({format_size(layout.minimum_bytes)}) that a device of this size needs"
            )
        if self.backing is None and (self.map or self.durable):
            raise ConfigError(f"{self.name}: map= and flush=durable need a backing file")
        return layout


def default_pools() -> Path:
    """Where the pool of a device goes that is told neither pools= nor tmemd=: a directory of the user's own in /dev/shm."""
    return Path(f"/dev/shm/tmem-{os.geteuid()}")


class ServedDevice:
    """An open device: its page path in `core`, and the thread that looks after it once `start` was called."""

    def __init__(self, config: DeviceConfig, pool_path: Path, pool_fd: int, core: _core.Device) -> None:
        self.config = config
        self.pool_path = pool_path
        self.core = core
        self._pool_fd = pool_fd
        self._undo = ExitStack()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._settled: tuple[int, ...] | None = None  # the counters' marks when settling last found nothing to do
        self._seen: tuple[int, ...] | None = None
        self._ticks = 0

    def start(self) -> None:
        """Begin the upkeep, in a thread of this process (call it after any fork)."""
        self.core.serve()
        self._thread = threading.Thread(target=self._run, name=f"tmem-{self.config.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the upkeep, unmap, unlock and close everything. The pool stays, for whoever attaches next."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.core.close()
        self._undo.close()

    def counters(self) -> Counters:
        """A snapshot of the device's counters."""
        return poolfile.read_counters(self._pool_fd, self.pool_path)

    def _run(self) -> None:
        while not self._stop.wait(TICK):
            self.tick()

    def tick(self) -> None:
        """One round of upkeep: what the control page asks for, the target, density, age."""
        self._ticks += 1
        self._answer()
        over = self.core.over_target()
        if over:
            self._shrink(over)
        else:
            self._settle_when_worth()
        if self._ticks % TICKS_PER_AGE == 0:
            self.core.age()

    def _answer(self) -> None:
        number, op, argument = self.core.request()
        if number == self.counters().done_request:
            return
        code = 0
        try:
            if op == Request.DRAIN:
                self.core.drain()
            elif op == Request.DEMOTE:
                self._demote(argument)
            elif op == Request.SETTLE:
                self._settle_fully()
            else:
                code = errno.EINVAL
        except OSError as error:
            code = error.errno or errno.EIO
        self.core.finish_request(number, code)

    def _demote(self, nbytes: int) -> None:
        """Give *nbytes* of the pool's memory back, as far as there are records to demote."""
        goal = max(self.counters().used_bytes - nbytes, 0)
        while (over := self.counters().used_bytes - goal) > 0:
            if not self._shrink(over):
                return

    def _shrink(self, over: int) -> bool:
        """Demote and compact one step towards giving *over* bytes back; False when nothing is left to demote."""
        if self.core.settle(MOVES_STEP) >= over:
            return True
        try:
            demoted = self.core.demote(min(over, DEMOTE_STEP))
        except OSError:
            return False  # counted as an I/O error; tried again at the next tick
        self.core.settle(MOVES_STEP)
        return demoted > 0

    def _marks(self) -> tuple[int, ...]:
        now = self.counters()
        return now.puts, now.invalidates, now.demotions

    def _settle_when_worth(self) -> None:
        """Compact when free slots take too large a part of the pool, or when there is nothing else to do."""
        marks = self._marks()
        idle, self._seen = marks == self._seen, marks
        if marks == self._settled:
            return
        wasted, used = self.core.wasted(), self.counters().used_bytes
        if (idle or wasted > used // 8) and not self._settle_step():
            self._settled = marks

    def _settle_step(self) -> bool:
        moves = self.counters().moves
        given = self.core.settle(MOVES_STEP)
        return given > 0 or self.counters().moves > moves

    def _settle_fully(self) -> None:
        while self._settle_step() and not self._stop.is_set():
            pass


def open_device(config: DeviceConfig, *, root: Path = Path("/")) -> ServedDevice:
    """Open what *config* names, creating what is not there yet; nothing on disk changes when it fails.

    *root* stands in for / where /proc and /sys are read. Raises ConfigError, or one of DeviceErrors.
    """
    layout = config.check()
    boot_id = uuid.UUID((root / "proc/sys/kernel/random/boot_id").read_text().strip())
    with ExitStack() as owned, ExitStack() as undo:
        backing = backings.find(config.backing, config.map, config.size) if config.backing else None
        if backing:
            owned.callback(backing.close)
        pool_fd, pool_path = _open_pool(config, undo)
        owned.callback(os.close, pool_fd)
        if not poolfile.lock(pool_fd, control=False):
            raise PoolError(f"{pool_path}: the pool is in use by another process")
        if not is_tmpfs(pool_path):
            raise PoolError(f"{pool_path}: not on a tmpfs; pools live in RAM")
        if not _attach(config, layout, backing, boot_id, pool_fd, pool_path):
            _create(config, layout, backing, boot_id, pool_fd, undo)
        core = _open_core(config, backing, pool_fd, pool_path, _cgroup_files(root, owned))
        undo.pop_all()
        served = ServedDevice(config, pool_path, pool_fd, core)
        served._undo = owned.pop_all()
    return served


def drain_offline(pool_path: Path) -> None:
    """Drain a pool that no plugin serves into the backing file it was last opened with. Raises one of DeviceErrors."""
    with open(pool_path, "rb") as pool:
        identity = poolfile.read_identity(pool.fileno(), pool_path)
        if identity is None:
            return
        limit = poolfile.read_counters(pool.fileno(), pool_path).limit_bytes
    if not identity.has_file:
        raise PoolError(f"{pool_path}: the pool has no backing file to drain to")
    config = DeviceConfig(
        identity.name, identity.size, Path(identity.backing), limit, pool_path.parent, map=Path(identity.map)
    )
    if not config.backing or not config.backing.exists():
        raise PoolError(f"{pool_path}: its backing file {identity.backing} is not there")
    served = open_device(config)
    try:
        served.core.drain()
    finally:
        served.close()


def _open_pool(config: DeviceConfig, undo: ExitStack) -> tuple[int, Path]:
    """The pool file, new and empty if there was none: from tmemd, or from the directory where none is named."""
    if config.tmemd:
        from tmemd import client, protocol  # noqa: PLC0415 - a device that works alone needs no protocol

        request = protocol.Attach(config.name, config.size, config.backing is not None, config.limit)
        try:
            fd, path = client.attach_pool(config.tmemd, request)
        except PoolError:
            # tmemd is away, but the pool it made may live: go on with its last target.
            own = config.pools / f"{config.name}{poolfile.SUFFIX}" if config.pools else None
            if own is None or not own.exists():
                raise
            return os.open(own, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), own
        return fd, Path(path)
    directory = config.pools or default_pools()
    if not directory.is_dir():
        directory.mkdir(mode=0o700)
        undo.callback(directory.rmdir)
    if not config.pools and (directory.stat().st_uid != os.geteuid() or directory.is_symlink()):
        raise PoolError(f"{directory} belongs to somebody else: name a directory with pools=DIR")
    path = directory / f"{config.name}{poolfile.SUFFIX}"
    if not path.exists():
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(path.unlink)
        return fd, path
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path


def _attach(
    config: DeviceConfig, layout: _core.Layout, backing: Backing | None, boot_id: uuid.UUID, fd: int, path: Path
) -> bool:
    """Whether the pool holds this device's pages. False when there is none, or it is from before the host died.

    Raises PoolError when it is another device's, or not whole.
    """
    identity = poolfile.read_identity(fd, path)
    if identity is None:
        return False
    header = backing.header if backing else None
    if identity.name != config.name or (backing is not None) != identity.has_file:
        raise PoolError(f"{path}: the pool of another device ({identity.name!r}); 'tmemctl destroy' forgets it")
    if identity.size != config.size:
        raise PoolError(f"{path}: the pool of a device of {identity.size} bytes, not of size={config.size}")
    if backing and (header is None or header.uuid != identity.uuid):
        raise PoolError(f"{path}: the pool of a device with another backing file ({identity.backing})")
    found = os.fstat(fd).st_size
    if found != layout.data_offset + layout.data_bytes:
        raise PoolError(
            f"{path}: the pool file is truncated: it has {found} of {layout.data_offset + layout.data_bytes} bytes"
        )
    if identity.boot_id != boot_id or (header and header.generation != identity.generation):
        return False
    now = replace(identity, **_paths(backing))
    if now != identity:
        os.pwrite(fd, now.pack(), 0)
    return True


def _paths(backing: Backing | None) -> dict[str, str]:
    return {"backing": str(backing.path), "map": str(backing.map_path)} if backing else {}


def _create(
    config: DeviceConfig, layout: _core.Layout, backing: Backing | None, boot_id: uuid.UUID, fd: int, undo: ExitStack
) -> None:
    """Make a new pool in the file behind *fd*, and first note in the map that no older one counts any more."""
    header = MapHeader(config.size, mapfile.GRANULE, uuid.uuid4(), boot_id, 1)
    if backing:
        is_new = backing.header is None
        backings.create(backing, undo, reserve=config.reserve)
        assert backing.header
        header = replace(backing.header, boot_id=boot_id, generation=backing.header.generation + 1)
        states = _block_states(layout, backing, header, is_new=is_new)
        mapfile.write_header(backing.map_fd, header)
        backing.header = header
    else:
        states = bytes(_blocks(config.size))
    identity = Identity(
        config.name, config.size, layout.index_offset, layout.data_offset, layout.data_bytes, header.uuid, boot_id,
        header.generation, backing is not None, **_paths(backing),
    )  # fmt: skip
    _format(fd, identity, states)


def _format(fd: int, identity: Identity, states: bytes) -> None:
    """Write an empty pool; the identity page last, so that what is half done is no pool. Control words stay."""
    control = os.pread(fd, poolfile.PAGE, poolfile.CONTROL_OFFSET)
    os.ftruncate(fd, 0)
    os.ftruncate(fd, identity.file_bytes)
    os.posix_fallocate(fd, 0, 3 * poolfile.PAGE)
    os.posix_fallocate(fd, poolfile.STATES_OFFSET, identity.index_offset - poolfile.STATES_OFFSET)
    os.pwrite(fd, control, poolfile.CONTROL_OFFSET)
    os.pwrite(fd, states, poolfile.STATES_OFFSET)
    os.pwrite(fd, identity.pack(), 0)


def _blocks(size: int) -> int:
    return -(-size // (512 * poolfile.PAGE))


def _block_states(layout: _core.Layout, backing: Backing, header: MapHeader, *, is_new: bool) -> bytes:
    """What each block is before anything was written: zeros in a new device, else in the file or lost, as the map says."""
    del layout
    zeros, in_file, lost, stale = 0, 1, 2, 3
    n = _blocks(header.size)
    if is_new:
        return bytes([stale if backing.is_block else zeros]) * n
    bits = mapfile.read_bits(backing.map_fd, header)
    per_block = 512 * poolfile.PAGE
    states = bytearray()
    for block in range(n):
        first, last = (
            block * per_block // header.granule,
            (min((block + 1) * per_block, header.size) - 1) // header.granule,
        )
        states.append(lost if any(bits[first : last + 1]) else in_file)
    return bytes(states)


def _cgroup_files(root: Path, owned: ExitStack) -> list[tuple[int, int]]:
    found = []
    for limit, usage in cgroup.memory_limits(root):
        with suppress(OSError):
            pair = os.open(limit, os.O_RDONLY | os.O_CLOEXEC), os.open(usage, os.O_RDONLY | os.O_CLOEXEC)
            owned.callback(os.close, pair[0])
            owned.callback(os.close, pair[1])
            found.append(pair)
    return found


def _open_core(
    config: DeviceConfig, backing: Backing | None, pool_fd: int, pool_path: Path, cgroups: list[tuple[int, int]]
) -> _core.Device:
    header = backing.header if backing else None
    try:
        return _core.Device(
            pool_fd, backing.fd if backing else -1, backing.map_fd if backing else -1, name=config.name,
            size=config.size, limit=config.limit or NO_LIMIT, granule=header.granule if header else mapfile.GRANULE,
            file_bytes=backing.file_bytes if backing else 0, direct=bool(backing and backing.direct),
            lost_zero=config.lost_zero, durable=config.durable, cgroup=cgroups,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise PoolError(f"{pool_path}: {error} ('tmemctl check' tells more)") from None
