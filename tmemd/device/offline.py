# SPDX-License-Identifier: BSD-3-Clause
"""What is done to a device that nobody serves: it is drained, saved, restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from io import RawIOBase
from pathlib import Path
from typing import Final

from tmemd import version
from tmemd.device.config import INSIDE, DeviceConfig, parse_place
from tmemd.device.parts import Parts, cgroup_files, find_parts
from tmemd.device.serve import open_device
from tmemd.store import poolfile, savefile
from tmemd.store.poolfile import AWAY, AwayError, Counters, Identity, PoolError
from tmemd.store.poolindex import State
from tmemd.store.savefile import Counts, Progress, Reader, SaveHeader

_ROOT: Final = Path("/")


def _look(pool_path: Path) -> tuple[Identity | None, Counters]:
    with open(pool_path, "rb") as pool:
        return (
            poolfile.read_identity(pool.fileno(), pool_path),
            poolfile.read_counters(pool.fileno(), pool_path),
        )


def _config(pool_path: Path, identity: Identity, counters: Counters) -> DeviceConfig:
    """The device as it was last opened. Raises PoolError where its backing file is gone."""
    backing = parse_place(identity.backing) if identity.has_file else None
    if isinstance(backing, Path) and not backing.exists():
        raise PoolError(f"{pool_path}: its backing file {identity.backing} is not there")
    inside = identity.bitmap == INSIDE
    return DeviceConfig(
        identity.name, identity.size, backing,
        counters.limit_bytes or identity.file_bytes, pool_path.parent,
        bitmap=Path(identity.bitmap) if identity.bitmap and not inside else None, inside=inside,
        durable=identity.is_durable,
    )  # fmt: skip


@contextmanager
def _saying_if_away(pool_path: Path) -> Iterator[None]:
    """Turn an OSError that the server's absence explains into an AwayError."""
    try:
        yield
    except OSError as error:
        if error.errno not in AWAY:
            raise
        raise AwayError(f"{pool_path}: {AWAY[error.errno]}") from None


def drain(pool_path: Path) -> None:
    """Drain a pool into the backing file it was last opened with. Raises AwayError, PoolError, OSError."""
    identity, counters = _look(pool_path)
    if identity is None:
        return
    if not identity.has_file:
        raise PoolError(f"{pool_path}: the pool has no backing file to drain to")
    with _saying_if_away(pool_path), closing(open_device(_config(pool_path, identity, counters))) as served:
        if served.away:
            raise served.away
        served.core.drain()


def _finished(pool_path: Path, what: str) -> tuple[Identity, Counters]:
    """The pool of a device that can be saved and restored. Raises PoolError."""
    identity, counters = _look(pool_path)
    if identity is None:
        raise PoolError(f"{pool_path}: the pool is unfinished: start its device once, and stop it")
    if identity.is_ephemeral:
        raise PoolError(f"{pool_path}: a cache device is not {what}: its source holds all it has")
    return identity, counters


def save(pool_path: Path, file: RawIOBase, *, whole: bool, progress: Progress) -> tuple[Counts, int, int]:
    """Write a device's pages to a save file: all of them, or (not *whole*) what its backing file does not hold.

    Returns its counts, how many pages were found damaged, and the first of them. Raises PoolError, OSError.
    """
    identity, counters = _finished(pool_path, "saved")
    with _saying_if_away(pool_path), closing(open_device(_config(pool_path, identity, counters))) as served:
        now, counters = _look(pool_path)
        assert now
        header = SaveHeader(
            name=now.name, size=now.size, uuid=now.uuid, epoch=now.epoch, changes=_changes(counters),
            whole=whole or not now.has_file, written_by=version(),
        )  # fmt: skip
        if counters.sync_failed and not header.whole:
            raise PoolError(
                f"{pool_path}: a sync of its backing file has failed, so what that holds is not certain:"
                " save it with --whole"
            )
        return savefile.write(served.core, header, file, progress)


def _changes(counters: Counters) -> int:
    """How many requests have changed the device since its pool was made."""
    return counters.writes + counters.trims


def restore(pool_path: Path, reader: Reader, *, force: bool, progress: Progress) -> Counts:
    """Make a device what it was when it was saved. Until that is done nobody can serve it, whatever is killed.

    *force*: even if it has changed since. Raises PoolError, OSError.
    """
    identity, counters = _finished(pool_path, "restored")
    header = reader.header
    with _saying_if_away(pool_path), ExitStack() as owned, ExitStack() as undo:
        # As a durable device it would have to begin with all of its zeros in the file.
        config = replace(_config(pool_path, identity, counters), durable=False)
        parts = find_parts(config, _ROOT, owned, undo, lambda _: None)
        _check_fits(parts, header, force=force)
        if parts.backing and parts.backing.away:
            raise parts.backing.away
        parts.open_overflow(owned, undo)  # of which nothing may be left
        parts.make_pool(undo, State.ZERO if header.whole and identity.has_file else State.INDEX)
        undo.pop_all()
        parts.keep_lease(owned)
        core = parts.open_core(cgroup_files(_ROOT, owned))
        with closing(core):
            counts = reader.run(core, progress)
            if identity.is_durable:
                core.drain()
        parts.end_restore()
    return counts


def _check_fits(parts: Parts, header: SaveHeader, *, force: bool) -> None:
    """Raise PoolError where the save file is not this device's, or the device has changed since."""
    identity, counters = _look(parts.pool_path)
    assert identity
    name = identity.name
    known = parts.backing.header.uuid if parts.backing and parts.backing.header else identity.uuid
    if header.size != identity.size:
        raise PoolError(f"{name} has {identity.size} bytes, and what was saved {header.size}")
    if not header.whole and header.uuid != known:
        raise PoolError(
            f"what was saved of {header.name} goes along with its backing file, and {name} has another: copy file and"
            " bitmap here before the device is first started, or save it with --whole"
        )
    if parts.is_half_restored(identity):
        return
    parts.check_identity(identity)
    if force:
        return
    if header.name != name:
        raise PoolError(f"device {header.name} was saved, not {name} (--force restores it nevertheless)")
    if not (_is_blank(identity, counters) or _is_as_saved(identity, counters, header)):
        raise PoolError(f"{name} has changed since it was saved, and would lose that (--force: lose it)")


def _is_blank(identity: Identity, counters: Counters) -> bool:
    """Whether nothing was ever written to the device."""
    is_new = identity.epoch == 1 and not counters.pages_in_tmem and not counters.pages_in_file
    return is_new and not _changes(counters)


def _is_as_saved(identity: Identity, counters: Counters, header: SaveHeader) -> bool:
    """Whether nobody has changed it since. Where the pool was lost with the host it was made anew once."""
    expected = {header.epoch: header.changes, header.epoch + 1: 0}
    return identity.uuid == header.uuid and expected.get(identity.epoch) == _changes(counters)
