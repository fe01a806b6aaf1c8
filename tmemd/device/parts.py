# SPDX-License-Identifier: BSD-3-Clause
"""Everything a device is made of, opened and held against each other, or created: pool, backing file, bitmap."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from tmemd.binding import _core
from tmemd.device import backing as backings
from tmemd.device import overflow
from tmemd.device import source as sources
from tmemd.device.backing import Backing
from tmemd.device.config import INSIDE, Debug, DeviceConfig, default_pools
from tmemd.device.lease import Fence, Lease, Times
from tmemd.device.source import Source
from tmemd.store import bitmapfile, poolfile
from tmemd.store.bitmapfile import BitmapHeader
from tmemd.store.poolfile import AWAY, AwayError, Identity, PoolError
from tmemd.store.poolindex import BLOCK_BYTES, State, block_count
from tmemd.store.tail import Tail
from tmemd.system import cgroup
from tmemd.system.tmpfs import is_tmpfs


class HalfRestoredError(PoolError):
    """A restore of the device was begun, and has not ended."""


@dataclass(frozen=True)
class Parts:
    """A device's parts, open and locked."""

    config: DeviceConfig
    layout: _core.Layout
    boot_id: uuid.UUID
    backing: Backing | None
    source: Source | None
    pool_path: Path
    pool_fd: int
    debug: Debug
    looked: float | None = None  # at the tail, without seeing that it was let go for us
    fence: Fence = field(default_factory=Fence)

    def adopt_pool(self) -> bool:
        """Whether the pool holds this device's pages. False when there is none, or it is from before the host died.

        Raises PoolError when it is another device's, or not whole.
        """
        identity = poolfile.read_identity(self.pool_fd, self.pool_path)
        if self.is_half_restored(identity):
            raise HalfRestoredError(_half_restored(self.config.name, self.backing))
        if identity is None:
            self.debug(f"{self.pool_path}: a new pool")
            return False
        self.check_identity(identity)
        if self.source:
            return self._adopt_copies(self.source, identity)
        fenced_at = poolfile.read_counters(self.pool_fd, self.pool_path).fenced_at
        if identity.boot_id != self.boot_id or (
            self.backing and not backings.goes_on(self.backing, identity.epoch, self.claims, fenced_at)
        ):
            self.debug(f"{self.pool_path}: a pool of epoch {identity.epoch} that no longer counts")
            return False
        now = replace(identity, backing=self._backing_name, bitmap=self._bitmap_name, is_durable=self.config.durable)
        if now != identity:
            os.pwrite(self.pool_fd, now.pack(), 0)
        pages = poolfile.read_counters(self.pool_fd, self.pool_path).pages_in_tmem
        self.debug(f"{self.pool_path}: adopted the pool of epoch {identity.epoch} with {pages} pages in tmem")
        return True

    def _adopt_copies(self, source: Source, identity: Identity) -> bool:
        """Whether the pool's pages are known to be what the source holds. A new pool costs no more than reads."""
        counters = poolfile.read_counters(self.pool_fd, self.pool_path)
        same = identity.boot_id == self.boot_id and identity.uuid == source.content_id() and not counters.sync_failed
        if same and os.fstat(self.pool_fd).st_size == self.layout.data_offset + self.layout.data_bytes:
            source.noted = identity.uuid
            self.debug(f"{self.pool_path}: adopted the pool with {counters.pages_in_tmem} pages in tmem")
            return True
        self.debug(f"{self.pool_path}: its pages may not be what {source.path} holds now")
        return False

    def note_source(self) -> None:
        """Say in the pool what the source holds, once that is known, so that who attaches next can adopt it."""
        if not self.source or (self.source.noted and not self.source.write):
            return  # what is only read keeps its name
        found = self.source.content_id()
        if not found or found == self.source.noted:
            return
        identity = poolfile.read_identity(self.pool_fd, self.pool_path)
        if identity:
            os.pwrite(self.pool_fd, replace(identity, uuid=found).pack(), 0)
            self.source.noted = found

    def note_handover(self, on: bool) -> None:
        """Say in the pool that the device is durable, whatever its configuration says, or that it is not any more."""
        identity = poolfile.read_identity(self.pool_fd, self.pool_path)
        if identity and identity.is_handed_over != on:
            os.pwrite(self.pool_fd, replace(identity, is_handed_over=on).pack(), 0)

    def is_handed_over(self) -> bool:
        """Whether it is durable for a handover, whatever its configuration says."""
        identity = poolfile.read_identity(self.pool_fd, self.pool_path)
        return identity is not None and identity.is_handed_over

    def is_half_restored(self, identity: Identity | None) -> bool:
        """Whether a restore was begun, and has not ended."""
        by_file = self.backing is not None and self.backing.header is not None and self.backing.header.restoring
        return by_file or (identity is not None and identity.is_restoring)

    def keep_half_restored(self, undo: ExitStack) -> None:
        """After the host died there is no pool that says so: there is to be one, for who restores the device again."""
        if poolfile.read_identity(self.pool_fd, self.pool_path) is None:
            self.make_pool(undo, State.INDEX)
            now = poolfile.read_counters(self.pool_fd, self.pool_path)
            now = msgspec.structs.replace(now, limit_bytes=self.config.limit or 0)
            poolfile.write_counters(self.pool_fd, now)
        undo.pop_all()

    def check_identity(self, identity: Identity) -> None:
        """Raise PoolError where the pool is another device's, or not whole."""
        path, size = self.pool_path, self.config.size
        whole, found = self.layout.data_offset + self.layout.data_bytes, os.fstat(self.pool_fd).st_size
        same_kind = (identity.has_file, identity.is_ephemeral) == (bool(self.file), bool(self.source))
        if identity.name != self.config.name or not same_kind:
            raise PoolError(f"{path}: the pool of another device ({identity.name!r}); 'tmemctl destroy' forgets it")
        if self.source:
            return
        if identity.size != size:
            raise PoolError(f"{path}: the pool of a device of {identity.size} bytes, not of size={size}")
        if self.backing and (self.backing.header is None or self.backing.header.uuid != identity.uuid):
            raise PoolError(f"{path}: the pool of a device with another backing file ({identity.backing})")
        if found != whole:
            raise PoolError(f"{path}: the pool file is truncated: it has {found} of {whole} bytes")

    @property
    def file(self) -> Backing | Source | None:
        """Where pages are that are not in tmem."""
        return self.backing or self.source

    @property
    def _backing_name(self) -> str:
        return str(self.file.path) if self.file else ""

    @property
    def _bitmap_name(self) -> str:
        return str(self.backing.bitmap_path or INSIDE) if self.backing else ""

    def claims(self, tail: Tail) -> Lease:
        """What this pool, which is one file as long as the host is up, claims the device with."""
        lease = lease_of(self.pool_fd, self.boot_id, self.config, tail, self.fence)
        lease.looked = self.looked
        return lease

    def make_pool(self, undo: ExitStack, restore: State | None = None) -> None:
        """Make a new pool in the open file, and note in the bitmap first that no older one counts any more.

        With *restore*, in which all blocks are then, it is half restored until `end_restore`.
        """
        header = BitmapHeader(self.config.size, bitmapfile.REGION, uuid.uuid4(), self.boot_id, 1)
        states = bytes([State.INDEX]) * block_count(header.size)
        if self.backing:
            restoring = restore is not None
            is_new = backings.begin_epoch(
                self.backing, self.boot_id, self.config, self.claims, undo, restoring=restoring
            )
            header = self.backing.header or header
            if not is_new:
                states = _states_by_bitmap(self.backing, header)
            elif self.backing.is_disk:
                states = bytes([State.ZERO]) * len(states)
        if self.source:
            states = bytes([State.FILE]) * len(states)
        if restore is not None:
            states = bytes([restore]) * len(states)
        layout = self.layout
        identity = Identity(
            name=self.config.name, size=header.size, index_offset=layout.index_offset, data_offset=layout.data_offset,
            data_bytes=layout.data_bytes, uuid=header.uuid, boot_id=self.boot_id, epoch=header.epoch,
            has_file=self.file is not None, backing=self._backing_name, bitmap=self._bitmap_name,
            is_ephemeral=self.source is not None, is_durable=self.config.durable, is_restoring=restore is not None,
        )  # fmt: skip
        try:
            _format(self.pool_fd, identity, states, self._known())
        except OSError as error:
            raise PoolError(f"{self.pool_path}: {error.strerror}") from None
        in_file, lost = states.count(State.FILE), states.count(State.LOST)
        self.debug(
            f"{self.pool_path}: made a pool of epoch {header.epoch}: of {len(states)} blocks of {BLOCK_BYTES} bytes"
            f" {in_file} are in the file, {lost} lost"
        )

    @property
    def limit(self) -> int:
        """Bytes of RAM that the pool may take at most."""
        return self.config.limit or self.layout.data_offset + self.layout.data_bytes

    def _known(self) -> poolfile.Counters:
        """What is to be found in a new pool, also before it is opened."""
        failed = self._has_source_failed()
        return poolfile.new_counters(limit=self.limit, least=self.layout.minimum_bytes, sync_failed=failed)

    def _has_source_failed(self) -> bool:
        """Whether a sync of the source failed since the host booted: no later one covers what was dropped then."""
        if not self.source or not poolfile.has_failed_sync(self.pool_fd):
            return False
        before = poolfile.read_identity(self.pool_fd, self.pool_path)  # None: it was killed while it was made
        return before is None or (before.boot_id, before.backing) == (self.boot_id, self._backing_name)

    def end_restore(self) -> None:
        """All pages are there: what was half restored is a device from now on."""
        if self.backing:
            backings.end_restore(self.backing)
        identity = poolfile.read_identity(self.pool_fd, self.pool_path)
        assert identity
        os.pwrite(self.pool_fd, replace(identity, is_restoring=False).pack(), 0)

    def keep_lease(self, owned: ExitStack) -> None:
        """Renew it from now on, for opening may take longer than it lasts; *owned* ends that."""
        if self.backing and self.backing.keeper:
            owned.callback(self.backing.keeper.stop)
            self.backing.keeper.start(self.debug)

    def open_overflow(self, owned: ExitStack, undo: ExitStack) -> None:
        """Open the file that takes what is written while its server is away. Raises PoolError.

        *owned* closes it, *undo* takes back what was made.
        """
        backing, path = self.backing, self.config.overflow
        if not backing or not backing.bitmap_path:
            return
        overflow.check_left(backing.bitmap_path, path)
        if path and backing.remote and backing.header:
            header = overflow.Header(-(-self.config.size // _core.PAGE), backing.header.uuid)
            fd = overflow.open_overflow(path, header, backing.bitmap_path, undo)
            owned.callback(os.close, fd)
            backing.overflow = _core.Overflow(backing.remote, fd, header.pages)

    def open_core(self, cgroups: list[tuple[int, int]]) -> _core.Device:
        """The page path over all of it. Raises PoolError when the pool contradicts itself."""
        config, backing, file = self.config, self.backing, self.file
        header = backing.header if backing else None
        durable = config.durable or self.is_handed_over()
        try:
            return _core.Device(
                self.pool_fd, file.fd if file else -1, backing.bitmap_fd if backing else -1, name=config.name,
                size=config.size, limit=self.limit, region=header.region if header else bitmapfile.REGION,
                file_bytes=file.file_bytes if file else 0, direct=bool(file and file.direct),
                lost_zero=config.lost_zero, durable=durable, ephemeral=self.source is not None,
                read_only=config.is_read_only, remote=file.remote if file else None, cgroup=cgroups,
                overflow=backing.overflow if backing else None,
                bitmap_offset=backing.bitmap_offset if backing else 0, fence=self.fence.word,
                fence_wait=config.timeout, prefetch=config.prefetch,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in AWAY and file:
                raise AwayError(f"{file.path}: {AWAY[error.errno]}") from None
            raise PoolError(f"{self.pool_path}: {error} ('tmemctl check' tells more)") from None


def lease_of(pool_fd: int, boot_id: uuid.UUID, config: DeviceConfig, tail: Tail, fence: Fence) -> Lease:
    """What a pool, which is one file as long as the host is up, claims its device with."""
    status = os.fstat(pool_fd)
    owner = uuid.uuid5(boot_id, f"{status.st_dev}:{status.st_ino}")
    return Lease(tail, owner, os.uname().nodename, fence.set, times=Times(config.lease_seconds))


def boot_id_of(root: Path) -> uuid.UUID:
    """Of the host, as it is up now."""
    return uuid.UUID((root / "proc/sys/kernel/random/boot_id").read_text().strip())


def open_parts(
    config: DeviceConfig, root: Path, undo: ExitStack, debug: Debug, looked: float | None = None
) -> tuple[Parts, _core.Device, ExitStack]:
    """Open what *config* names, creating what is not there yet; *undo* takes back what was created.

    The stack returned closes what is open. *looked*: as of Lease. *root* stands in for / where /proc and /sys are read;
    *debug* is told what was found. Raises PoolError, OSError.
    """
    with ExitStack() as owned, ExitStack() as made:
        parts = replace(find_parts(config, root, owned, made, debug), looked=looked)
        try:
            adopted = parts.adopt_pool()
        except HalfRestoredError:
            parts.keep_half_restored(made)
            raise
        undo.push(made.pop_all())
        if not adopted:
            parts.make_pool(undo)
        parts.keep_lease(owned)
        parts.open_overflow(owned, undo)
        core = parts.open_core(cgroup_files(root, owned))
        owned.callback(core.close)
        owned.enter_context(parts.fence.of(core))
        if parts.source and not parts.source.is_as_opened():
            raise PoolError(f"{parts.source.path}: somebody changed it while it was opened")
        return parts, core, owned.pop_all()


def find_parts(config: DeviceConfig, root: Path, owned: ExitStack, undo: ExitStack, debug: Debug) -> Parts:
    """Open and lock what is there of a device, and its pool file, made if need be; *owned* closes it again.

    The rest is as of `open_parts`.
    """
    layout = config.check()
    boot_id = boot_id_of(root)
    backing = backings.find(config) if config.backing else None
    if backing:
        owned.callback(backing.close)
        if backing.away and not (backing.header and backing.header.boot_id == boot_id):
            raise backing.away  # before a pool is made
        found = f"with bitmap {backing.bitmap_path} of epoch {backing.header.epoch}" if backing.header else "new"
        debug(f"{backing.path}: {found}, {_how(backing)}")
    source = _open_source(config) if config.source else None
    if source:
        owned.callback(source.close)
        debug(f"{source.path}: {_how(source)}")
    pool_fd, pool_path = open_pool(config, undo)
    owned.callback(os.close, pool_fd)
    claim_pool(pool_fd, pool_path)
    if backing and backing.away:
        _go_on_without_server(backing, pool_fd, pool_path)
        debug(f"{backing.away}: going on without it")
    return Parts(config, layout, boot_id, backing, source, pool_path, pool_fd, debug)


def _go_on_without_server(backing: Backing, pool_fd: int, pool_path: Path) -> None:
    """Only the pool that was last in use with it can do that: of what another lacks, only the server has the pages."""
    assert backing.away
    assert backing.header
    last = backing.header.boot_id, backing.header.epoch, str(backing.path)
    identity = poolfile.read_identity(pool_fd, pool_path)
    if identity is None or (identity.boot_id, identity.epoch, identity.backing) != last:
        raise backing.away
    known = poolfile.Snapshot().take(pool_fd, pool_path).remote()
    backings.go_on_without(backing, known.export_bytes, known.abilities)


def _how(file: Backing | Source) -> str:
    if file.remote:
        return f"NBD, {file.remote.status.connections} connection"
    return "O_DIRECT" if file.direct else "through the page cache"


def _open_source(config: DeviceConfig) -> Source:
    assert config.source
    source = sources.open_source(config)
    if source.size != config.size:
        source.close()
        raise PoolError(f"{source.path}: its size changed from {config.size} to {source.size} bytes just now")
    return source


def claim_pool(fd: int, path: Path) -> None:
    """Become the one process that serves the pool."""
    if not poolfile.lock(fd):
        raise PoolError(f"{path}: the pool is in use by another process")
    status = os.fstat(fd)
    if not status.st_nlink:
        raise PoolError(f"{path}: the pool was destroyed a moment ago; try again")
    if status.st_uid != os.geteuid():
        raise PoolError(f"{path}: the pool belongs to user {status.st_uid}")
    if not is_tmpfs(path):
        raise PoolError(f"{path}: not on a tmpfs; pools live in RAM")


def open_pool(config: DeviceConfig, undo: ExitStack) -> tuple[int, Path]:
    """The pool file, new and empty if there was none: from tmemd, or from the directory where none is named."""
    directory = config.pools or default_pools()
    path = directory / f"{config.name}{poolfile.SUFFIX}"
    if config.tmemd:
        return _attach_by_tmemd(config.tmemd, config, path)
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
        undo.callback(_remove_empty, directory)
    if not config.pools and (directory.is_symlink() or directory.stat().st_uid != os.geteuid()):
        raise PoolError(f"{directory} belongs to somebody else: name a directory with pools=DIR")
    if path.exists():
        return _open_existing(path), path
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    undo.callback(path.unlink)
    return fd, path


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # another device has moved in
        directory.rmdir()


def _open_existing(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _attach_by_tmemd(socket: Path, config: DeviceConfig, known: Path) -> tuple[int, Path]:
    from tmemd import client, protocol  # noqa: PLC0415 - a device that works alone needs neither

    request = protocol.Attach(config.name, config.size, config.file is not None, config.limit)
    try:
        fd, path = client.attach_pool(socket, request)
    except client.UnreachableError:
        # The pool it made lives, and goes on with its last target.
        if config.pools is None or not known.exists():
            raise
        return _open_existing(known), known
    return fd, Path(path)


def _format(fd: int, identity: Identity, states: bytes, known: poolfile.Counters) -> None:
    """Write an empty pool; the identity page last, so that what is half done is no pool. Control words stay.

    One that is to be restored says so first: what is half done is half restored, and not a new device. It keeps its
    counters, its limit among them.
    """
    control = os.pread(fd, poolfile.CONTROL_BYTES, poolfile.CONTROL_OFFSET)
    if identity.is_restoring:
        os.pwrite(fd, identity.pack(), 0)
        os.ftruncate(fd, poolfile.STATES_OFFSET)
    else:
        poolfile.unmake(fd, known)
    os.ftruncate(fd, identity.file_bytes)
    os.posix_fallocate(fd, 0, identity.index_offset)
    os.pwrite(fd, control, poolfile.CONTROL_OFFSET)
    os.pwrite(fd, states, poolfile.STATES_OFFSET)
    os.pwrite(fd, identity.pack(), 0)


def _half_restored(name: str, backing: Backing | None) -> str:
    paths = [str(path) for path in (backing.path, backing.bitmap_path) if path] if backing else []
    files = f" and remove {' and '.join(paths)}" if paths else ""
    return (
        f"{name}: a restore of it was begun, and has not ended: run 'tmemctl restore {name} FILE' again (to give its"
        f" pages up, destroy the pool{files})"
    )


def _states_by_bitmap(backing: Backing, header: BitmapHeader) -> bytes:
    """Without the pool that was in use with it, what the bitmap says: in the file, or lost."""
    bits = backing.bits()
    states = bytearray()
    for start in range(0, header.size, BLOCK_BYTES):
        last = min(start + BLOCK_BYTES, header.size) - 1
        is_set = any(bits[start // header.region : last // header.region + 1])
        states.append(State.LOST if is_set else State.FILE)
    return bytes(states)


def cgroup_files(root: Path, owned: ExitStack) -> list[tuple[int, int]]:
    """The files of each memory cgroup above us, open: (limit, usage)."""
    found = []
    for paths in cgroup.memory_limits(root):
        with suppress(OSError):
            pair = []
            for path in paths:
                pair.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                owned.callback(os.close, pair[-1])
            found.append((pair[0], pair[1]))
    return found
