# SPDX-License-Identifier: BSD-3-Clause
"""What clients ask about pools, carried out on their files: by tmemd, and by tmemctl itself where no tmemd runs."""

from __future__ import annotations

from typing import Final

import msgspec

from tmemd import protocol
from tmemd.protocol import PoolStatus
from tmemd.settings import PoolSettings
from tmemd.store import poolfile, requests
from tmemd.store.directory import Pools
from tmemd.store.pool import Pool, Stray, pool_path
from tmemd.store.poolfile import Counters, PoolError, RemoteState, Snapshot
from tmemd.store.requests import Choice

_REQUESTS: Final[dict[protocol.Work, requests.Request]] = {
    "drain": requests.Request.DRAIN,
    "demote": requests.Request.DEMOTE,
    "compact": requests.Request.COMPACT,
    "flush": requests.Request.FLUSH,
    "handover": requests.Request.HANDOVER,
    "handback": requests.Request.HANDBACK,
    "settle": requests.Request.COMPACT,
}
_ONLY_TMEMD: Final[dict[type[protocol.Request], str]] = {
    protocol.Attach: "only tmemd attaches plugins",
    protocol.Host: "only tmemd looks after the host's memory",
    protocol.Events: "only tmemd remembers what happened",
    protocol.Rename: "only tmemd remembers what was set",
}
_NO_COUNTERS: Final = Counters(*(0 for _ in Counters.__struct_fields__))


def perform(pools: Pools, request: protocol.Request) -> protocol.Answer:
    """Carry out anything but an Attach. Raises PoolError."""
    match request:
        case protocol.List(long):
            return protocol.Listed(statuses(pools, long=long))
        case protocol.Show(name, long, number):
            with pools.pool(name) as pool:
                answer = pool.answer(number) if number else None  # before the status, which is what came of it
                return protocol.Listed([msgspec.structs.replace(pool_status(pool, long=long), answer=answer)])
        case protocol.Set():
            _set(pools, request)
        case protocol.Freeze(name, frozen):
            _freeze(pools, name, frozen)
        case protocol.Ask(name, work, nbytes, min_age, raw_only):
            with pools.pool(name, control=True) as pool:
                return protocol.Asked(pool.ask(_REQUESTS[work], nbytes, Choice(min_age, raw_only)))
        case protocol.Destroy(name, lose_pages):
            pools.destroy(name, lose_pages=lose_pages)
        case _:
            raise PoolError(_ONLY_TMEMD[type(request)])
    return protocol.Done()


def _freeze(pools: Pools, name: str | None, frozen: bool) -> None:
    if name is not None:
        with pools.pool(name, control=True) as pool:
            pool.set_frozen(frozen)
    elif failed := pools.adopt_all(lambda pool: pool.set_frozen(frozen)):
        raise PoolError(f"all pools were {'frozen' if frozen else 'thawed'} but {', '.join(sorted(failed))}")


def _set(pools: Pools, request: protocol.Set) -> None:
    """What the pool file itself keeps; the rest only means something to a tmemd. All of it or nothing."""
    for field, words in _WITHOUT_TMEMD.items():
        if getattr(request, field) is not msgspec.UNSET or field in request.forget:
            raise PoolError(f"pool {request.name}: {words}")
    compression = True if "compression" in request.forget else request.compression
    with pools.pool(request.name, control=True) as pool:
        pool.finished()
        if isinstance(request.target, int):
            pool.check_size("target", request.target)
        if request.target is not msgspec.UNSET:
            poolfile.write_target(pool.fd, poolfile.NO_TARGET if request.target is None else request.target)
        if isinstance(compression, bool):
            poolfile.write_compression(pool.fd, compression)


# Why what tmemd weighs pools by is refused where there is none.
_WITHOUT_TMEMD: Final = {
    "weight": "a weight is its part of what a tmemd shares out, and no tmemd has this directory: set a --target",
    "cap": "a cap bounds what a tmemd gives, and no tmemd has this directory: set a --target, which nobody changes",
    "minimum": "a minimum bounds what a tmemd takes, and no tmemd has this directory: set a --target, which nobody"
    " changes",
}


def statuses(pools: Pools, *, long: bool = False) -> list[PoolStatus]:
    """Every pool's status; those that vanish meanwhile are left out. Raises PoolError."""
    return [found for name in pools.names() if (found := status(pools, name, long=long))]


def status(pools: Pools, name: str, *, long: bool = False) -> PoolStatus | None:
    """That of one pool, also of one that cannot be opened; None where there is none."""
    try:
        with pools.pool(name) as pool:
            return pool_status(pool, long=long)
    except PoolError as error:
        stray = Stray.at(pool_path(pools.directory, name), str(error))
        return _stray_status(stray) if stray else None


def pool_status(pool: Pool, *, long: bool = False) -> PoolStatus:
    """What is known of it, with *long* latencies and ages as well, also while it is unfinished or damaged."""
    now, error = None, None
    try:
        identity = pool.identity()
        now = Snapshot().take(pool.fd, pool.path) if identity else None
    except PoolError as failure:
        identity, error = None, str(failure)
    served, half_restored = pool.is_served(), identity is not None and identity.is_restoring
    if half_restored and not served:
        error = "a restore of it was begun, and has not ended: run 'tmemctl restore' again"
    control = now.control() if now else poolfile.read_control(pool.fd)
    counters = now.counters() if now else _counters_without_plugin(pool.taken())
    limit, file = counters.limit_bytes, identity.backing if identity else ""
    is_ephemeral = identity is not None and identity.is_ephemeral
    return PoolStatus(
        name=pool.name,
        path=str(pool.path),
        uid=pool.uid(),
        size=identity.size if identity else 0,
        has_file=identity.has_file if identity else False,
        backing="" if is_ephemeral else file,
        target_bytes=limit if control.target is None else min(control.target, limit),
        frozen=control.frozen,
        served=served,
        error=error,
        counters=counters,
        kind=identity.kind if identity else None,
        source=file if is_ephemeral else "",
        taken_bytes=pool.taken(),
        unfinished=identity is None and error is None,
        half_restored=half_restored,
        settings=PoolSettings(compression=control.compression, frozen=control.frozen),
        freeable_bytes=poolfile.freeable(identity, counters) if identity else 0,
        latencies=now.latencies() if now and long else None,
        ages=now.ages() if now and long else None,
        doors=now.doors() if now else None,
        miss_seconds=now.file_read_ns() / 1e9 / counters.file_reads if now and counters.file_reads else None,
        remote=_remote(now) if now else None,
        durable=identity is not None and (identity.is_durable or identity.is_handed_over),
        handed_over=identity is not None and identity.is_handed_over,
        epoch=identity.epoch if identity else None,
    )


def _remote(pool: Snapshot) -> RemoteState | None:
    state = pool.remote()
    return state if state.published else None


def _stray_status(stray: Stray) -> PoolStatus:
    return PoolStatus(
        name=stray.name, path=str(stray.path), uid=stray.uid, size=0, has_file=False, backing="", target_bytes=0,
        frozen=False, served=False, error=stray.reason, counters=_counters_without_plugin(stray.taken),
        taken_bytes=stray.taken,
    )  # fmt: skip


def _counters_without_plugin(taken: int) -> Counters:
    """All that is known of a pool that no plugin has made or that cannot be read: the bytes of RAM it takes."""
    return msgspec.structs.replace(_NO_COUNTERS, used_bytes=taken)
