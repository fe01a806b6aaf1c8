# SPDX-License-Identifier: BSD-3-Clause
"""The backing of a device, and its write-intent bitmap or tail: found, checked and opened, or created."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from tmemd.binding import _core
from tmemd.device import files, remote
from tmemd.device.config import DeviceConfig, Uri
from tmemd.device.files import LocalStore
from tmemd.device.lease import HeldError, Keeper, Lease
from tmemd.device.remote import RemoteStore
from tmemd.store import bitmapfile, tail
from tmemd.store.bitmapfile import BitmapHeader
from tmemd.store.poolfile import PAGE, AwayError, PoolError
from tmemd.store.tail import Store, Tail

_PROBE: Final = 8 << 20  # how much of a block device's start and end must be zeros for it to count as empty


Claims: TypeAlias = Callable[[Tail], Lease]  # on behalf of a pool


@dataclass
class Backing:
    """An open and locked backing with its bitmap. `header` is None for one that is new, until its epoch begins."""

    path: Path | Uri
    bitmap_path: Path | None  # None: the bitmap is in its tail
    size: int  # of the device, in bytes
    is_disk: bool  # a block device or an NBD server's export: as long as it is, whatever it held before
    fd: int = -1
    bitmap_fd: int = -1
    header: BitmapHeader | None = None
    direct: bool = False
    remote: _core.Remote | None = None  # instead of fd
    away: AwayError | None = None  # why that could not be connected
    overflow: _core.Overflow | None = None  # of that
    tail: Tail | None = None
    lease: Lease | None = None  # on the tail, once we have it
    keeper: Keeper | None = None

    @property
    def store(self) -> Store:
        """Where its tail is."""
        return RemoteStore(self.remote) if self.remote else LocalStore(self.bitmap_fd)

    @property
    def bitmap_offset(self) -> int:
        """Where a bitmap would begin that has its bits where the tail has them."""
        return self.tail.map_offset - bitmapfile.BITS_OFFSET if self.tail else 0

    @property
    def length(self) -> int:
        """Bytes that are there."""
        return self.remote.status.size if self.remote else files.length(self.fd)

    @property
    def file_bytes(self) -> int:
        """How much of the file may be read and written: whole pages, but for a block device that ends in one."""
        whole = -(-self.size // PAGE) * PAGE
        return min(whole, self.length) if self.is_disk else whole

    def bits(self) -> list[bool]:
        """For each region, whether its bit is set: the file is not to be trusted there."""
        assert self.header
        return self.tail.read_bits() if self.tail else bitmapfile.read_bits(self.bitmap_fd, self.header)

    def let_go(self) -> None:
        """Have nothing to do with it any more, though the core has its descriptors: they lead nowhere now."""
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (self.fd, self.bitmap_fd):
            if fd >= 0:
                os.dup2(nowhere, fd, inheritable=False)
        os.close(nowhere)

    def close(self) -> None:
        """Let go of it all, which unlocks it."""
        if self.lease:
            if self.remote:
                self.remote.hurry()
            with suppress(OSError):  # then others wait for as long as we could have had it
                self.lease.release()
            self.lease = None
        for fd in (self.fd, self.bitmap_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.bitmap_fd = -1
        self.remote = None


def find(config: DeviceConfig) -> Backing:
    """Check what is there and lock it, changing nothing; a file that does not exist yet is left to `create`.

    *config* has a backing. Raises PoolError.
    """
    path = config.backing
    assert path is not None
    is_disk = isinstance(path, Uri) or path.is_block_device()
    has_tail = config.inside or (is_disk and config.bitmap is None)
    backing = Backing(path, None if has_tail else config.bitmap or Path(f"{path}.map"), config.size, is_disk)
    with ExitStack() as on_error:
        on_error.callback(backing.close)
        _check_directories(backing)
        if isinstance(path, Uri):
            backing.remote, backing.away = remote.reach(config, path, write=True)
            if not backing.away:
                _check_length(backing)
        elif path.exists():
            _open(backing, path)
        is_there = backing.fd >= 0 or backing.remote is not None
        if backing.away and (backing.bitmap_path is None or not backing.bitmap_path.exists()):
            raise backing.away
        if backing.bitmap_path is None:
            if is_there:
                _find_tail(backing, config.name)
        elif backing.bitmap_path.exists():
            _open_bitmap(backing, backing.bitmap_path)
        elif is_there:
            _check_empty(backing, f"bitmap ({backing.bitmap_path})", backing.length)
        on_error.pop_all()
    return backing


def go_on_without(backing: Backing, export_bytes: int, abilities: int) -> None:
    """Have the device served although its server is `away`, which was like that. Raises AwayError."""
    assert backing.away
    assert backing.remote
    with suppress(OSError):
        backing.remote.know(export_bytes, abilities)
    if backing.length < backing.size:
        raise backing.away


@dataclass(frozen=True)
class Glance:
    """What is read of a device that another process may have; nothing is locked."""

    tail: Tail
    store: Store
    close: Callable[[], None]


def glance(config: DeviceConfig) -> Glance | None:
    """Look at a device that may be in use. None: it has no tail. Raises PoolError."""
    path = config.backing
    assert path is not None
    if isinstance(path, Path) and not path.exists():
        return None
    with ExitStack() as opened:
        store = _store_of(config, path, opened)
        try:
            found = tail.find(store, str(path))
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}") from None
        if not found:
            return None
        _check_fits(found, path, config.name, config.size)
        return Glance(found, store, opened.pop_all().close)


def _store_of(config: DeviceConfig, path: Path | Uri, opened: ExitStack) -> Store:
    if isinstance(path, Uri):
        return RemoteStore(remote.connect(config, path, write=True))
    with files.named_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    files.use_direct(fd, path)
    return LocalStore(fd)


def _check_fits(found: Tail, path: Path | Uri, name: str, size: int) -> None:
    if found.identity.name != name:
        raise PoolError(f"{path} belongs to device {found.identity.name}, says its tail")
    if found.identity.size != size:
        raise PoolError(f"{path}: its tail is of a device of {found.identity.size} bytes, not of size={size}")


def _check_empty(backing: Backing, lacking: str, end: int) -> None:
    if not _is_empty(backing, end):
        raise PoolError(
            f"{backing.path} is not empty and has no {lacking}: its content is not tmem's; "
            f"{'wipe it' if backing.is_disk else 'move it away'} if it is not needed"
        )


def _check_directories(backing: Backing) -> None:
    for path in (backing.path, backing.bitmap_path):
        if isinstance(path, Path) and not path.parent.is_dir():
            raise PoolError(f"{path.parent}: no such directory")


def _check_length(backing: Backing) -> None:
    if backing.length < backing.size:
        raise PoolError(f"{backing.path} has {backing.length} bytes, less than size={backing.size}")
    room = backing.length - tail.tail_bytes(backing.length)
    if backing.bitmap_path is None and room < backing.size:
        raise PoolError(f"{backing.path} has room for {room} bytes beside its tail, less than size={backing.size}")


def begin_epoch(
    backing: Backing, boot_id: uuid.UUID, config: DeviceConfig, claims: Claims, undo: ExitStack, *, restoring: bool
) -> bool:
    """Note that no pool of an earlier epoch counts any more, and create what `find` did not find; *undo* removes that.

    *restoring*: nor does this one, until `end_restore`. Returns whether nobody has served it yet. Raises PoolError,
    also where another host has the device.
    """
    is_new = backing.header is None or backing.header.unused
    try:
        if backing.header is None and not backing.is_disk:
            _create_file(backing, Path(backing.path), undo)
            _extend(backing, reserve=config.reserve)
        if backing.bitmap_path is None:
            _claim_tail(backing, config.name, claims, undo, restoring=restoring)
        else:
            header = backing.header or _create_bitmap(backing, backing.bitmap_path, undo)
            backing.header = replace(header, boot_id=boot_id, epoch=header.epoch + 1)
            _note(backing, restoring=restoring, unused=is_new and not restoring)
    except HeldError as error:
        raise PoolError(f"{backing.path}: {error}") from None
    except OSError as error:
        raise PoolError(_explain(backing, error, reserve=config.reserve)) from None
    return is_new


def goes_on(backing: Backing, epoch: int, claims: Claims, fenced_at: int) -> bool:
    """Whether the pool of that epoch is the one that was in use with it last; then it is ours again.

    *fenced_at* is the time, in nanoseconds since boot, until which its last process might serve it. Raises PoolError.
    """
    assert backing.header
    if not backing.tail:
        return backing.header.epoch == epoch
    lease = claims(backing.tail)
    try:
        if not lease.resume(epoch, fenced_at / 1e9):
            return False
    except HeldError as error:
        raise PoolError(f"{backing.path}: {error}") from None
    except OSError as error:
        raise PoolError(f"{backing.path}: {error.strerror}") from None
    backing.lease, backing.keeper = lease, Keeper(lease)
    if backing.remote:
        backing.remote.bound(lease.times.lease / 2)  # the claim's, which may be shorter than one made now
    _expect_mark(backing)
    return True


def end_restore(backing: Backing) -> None:
    """All that was to be restored is there."""
    _note(backing, restoring=False, unused=False)


def note_use(backing: Backing) -> None:
    """Note that it is about to be served: without its pool nobody can take it for new any more. Raises PoolError."""
    if not backing.header or not backing.header.unused:
        return
    try:
        _note(backing, restoring=backing.header.restoring, unused=False)
    except OSError as error:
        raise PoolError(f"{backing.path}: {error.strerror}") from None


def _note(backing: Backing, *, restoring: bool, unused: bool) -> None:
    assert backing.header
    backing.header = replace(backing.header, restoring=restoring, unused=unused)
    if backing.tail:
        backing.tail.note(restoring=restoring, unused=unused)
        _expect_mark(backing)
    else:
        bitmapfile.write_header(backing.bitmap_fd, backing.header)


def _claim_tail(backing: Backing, name: str, claims: Claims, undo: ExitStack, *, restoring: bool) -> None:
    is_new = backing.tail is None
    if backing.tail is None:
        if not backing.remote and backing.bitmap_fd < 0:
            backing.bitmap_fd = _open_again(backing)
        identity = tail.Identity(backing.size, backing.length, bitmapfile.REGION, uuid.uuid4(), name, unused=True)
        backing.tail = Tail(backing.store, identity)
    backing.lease = claims(backing.tail)
    if is_new:
        # Only the ends of a disk were looked at: what lies between is no zeros to rely on.
        backing.lease.create(trusted=not backing.is_disk)
        if backing.is_disk:
            undo.callback(_erase, backing.path, backing.tail)
    else:
        backing.lease.take()
    backing.keeper = Keeper(backing.lease)
    backing.header = _header_of(backing.tail, backing.lease.epoch)
    _note(backing, restoring=restoring, unused=backing.header.unused and not restoring)


def _expect_mark(backing: Backing) -> None:
    """A server that comes back with another device, or an empty one, is not to be used."""
    if backing.remote and backing.tail:
        backing.remote.expect(*backing.tail.mark)


def _erase(path: Path | Uri, made: Tail) -> None:
    """Have the disk as it was; it was closed meanwhile."""
    with ExitStack() as opened:
        store = made.store
        if isinstance(path, Path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            store = LocalStore(fd)
        Tail(store, made.identity).erase()


def _header_of(found: Tail, epoch: int) -> BitmapHeader:
    identity = found.identity
    unknown = uuid.UUID(int=0)
    return BitmapHeader(
        identity.size, identity.region, identity.uuid, unknown, epoch, identity.restoring, identity.unused
    )


def _create_file(backing: Backing, path: Path, undo: ExitStack) -> None:
    if backing.fd < 0:
        backing.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        undo.callback(path.unlink)
        files.lock(backing.fd, path)
        backing.direct = files.use_direct(backing.fd, path)
    undo.callback(os.truncate, path, os.fstat(backing.fd).st_size)


def _explain(backing: Backing, error: OSError, *, reserve: bool) -> str:
    if error.errno == errno.ENOSPC and reserve:
        return (
            f"{backing.path}: no room for its {backing.size} bytes: make room, or let it grow as it fills "
            f"(reserve=no; a full disk then means failed writes)"
        )
    return f"{error.filename or backing.path}: {error.strerror}"


def _extend(backing: Backing, *, reserve: bool) -> None:
    length = backing.file_bytes if backing.bitmap_path else tail.length_for(backing.size)
    if reserve:
        os.posix_fallocate(backing.fd, 0, length)
    else:
        os.ftruncate(backing.fd, length)
    os.fsync(backing.fd)


def _create_bitmap(backing: Backing, bitmap_path: Path, undo: ExitStack) -> BitmapHeader:
    """It has its name only when it is whole: what a process that is killed here leaves behind is overwritten."""
    new = Path(f"{bitmap_path}.new")
    new.unlink(missing_ok=True)
    backing.bitmap_fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    undo.callback(new.unlink, missing_ok=True)
    header = BitmapHeader(backing.size, bitmapfile.REGION, uuid.uuid4(), uuid.UUID(int=0), 0, unused=True)
    # Only the ends of a disk were looked at: what lies between is no zeros to rely on.
    bitmapfile.create_bits(backing.bitmap_fd, header, trusted=not backing.is_disk)
    bitmapfile.write_header(backing.bitmap_fd, header)
    new.rename(bitmap_path)
    undo.callback(bitmap_path.unlink)
    for directory in {path.parent for path in (bitmap_path, backing.path) if isinstance(path, Path)}:
        files.sync_directory(directory)
    return header


def _open(backing: Backing, path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not backing.is_disk:
        raise PoolError(f"{path} is neither a file nor a block device")
    with files.named_errors(path):
        # On a block device O_EXCL fails where it is mounted or somebody else's.
        backing.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if backing.is_disk else 0))
    if not backing.is_disk:  # whose mode is the system's: root's, and its group's, which may read every disk
        files.check_private(backing.fd, path)
    files.lock(backing.fd, path)
    backing.direct = files.use_direct(backing.fd, path)
    if backing.is_disk:
        _check_length(backing)


def _open_again(backing: Backing) -> int:
    """The file once more, for its tail: a sync that fails is told to each who has it open."""
    fd = os.open(f"/proc/self/fd/{backing.fd}", os.O_RDWR | os.O_CLOEXEC)
    if backing.direct:
        files.use_direct(fd, Path(backing.path))
    return fd


def _find_tail(backing: Backing, name: str) -> None:
    """Its tail, if it has one, and that it may have one otherwise."""
    path = backing.path
    if not backing.remote:
        backing.bitmap_fd = _open_again(backing)
    try:
        found = tail.find(backing.store, str(path))
        data_end = backing.length
        if not found and tail.is_unfinished(backing.store):
            data_end -= tail.tail_bytes(backing.length)
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror}") from None
    if not found:
        _check_empty(backing, "tail at its end", data_end)
        return
    _check_fits(found, path, name, backing.size)
    backing.tail, backing.header = found, _header_of(found, 0)


def _open_bitmap(backing: Backing, bitmap_path: Path) -> None:
    path = backing.path
    with files.named_errors(bitmap_path):
        backing.bitmap_fd = os.open(bitmap_path, os.O_RDWR | os.O_CLOEXEC)
    files.check_private(backing.bitmap_fd, bitmap_path)
    files.lock(backing.bitmap_fd, bitmap_path)
    header = bitmapfile.read_header(backing.bitmap_fd, bitmap_path)
    if header.size != backing.size:
        raise PoolError(f"{bitmap_path}: the bitmap is of a device of {header.size} bytes, not of size={backing.size}")
    length = backing.length if backing.fd >= 0 or backing.remote else 0
    if length < backing.size and not backing.away:
        state = f"has only {length} of its {backing.size} bytes" if length else "is missing or empty"
        raise PoolError(
            f"{path} {state}, but its bitmap {bitmap_path} says it is in use: restore it, or remove the bitmap"
        )
    backing.header = header


def _is_empty(backing: Backing, end: int) -> bool:
    """Whether nothing was ever written up to *end*: a file without data, or a disk with zeros where signatures are.

    Those are at its start, at its end, and at the end of what we use of it: there the file is read after the host died
    even if the page was never written.
    """
    if not backing.is_disk:
        try:
            return os.lseek(backing.fd, 0, os.SEEK_DATA) >= end
        except OSError as error:
            return error.errno == errno.ENXIO
    starts = 0, max(backing.size - _PROBE, 0), end - min(end, _PROBE)
    return not any(_read(backing, start, min(_PROBE, end - start)).strip(b"\0") for start in starts)


def _read(backing: Backing, offset: int, length: int) -> bytes:
    """Of a disk. Raises PoolError."""
    try:
        if backing.remote:
            return backing.remote.read(offset, length)
        with open(backing.path, "rb", buffering=0) as device:
            return os.pread(device.fileno(), length, offset)
    except OSError as error:
        raise PoolError(f"{backing.path}: {error.strerror}") from None
