# SPDX-License-Identifier: BSD-3-Clause
"""What would fail at start, or would not hold, of a configuration; found without starting."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemd.daemon import metricserver
from tmemd.daemon.access import Flags, grants
from tmemd.daemonconfig import DEFAULT_PATH, Address, DaemonConfig, PoolConfig, load_config
from tmemd.settings import Overrides, merge, read_kept
from tmemd.sizes import format_size
from tmemd.store.poolfile import PoolError

_TIMEOUT: Final = 2.0  # seconds, for who listens on the metrics' address already to say who it is


def problems(path: Path | None, total: int, *, flags: Flags, state: Path, metrics: Address | None) -> Iterator[str]:
    """What is wrong with the file, a line each, on a host with *total* bytes of RAM.

    *flags*, *state* and *metrics* are what the command line says. Where the file cannot be read that is all.
    """
    where = path or DEFAULT_PATH
    try:
        config = load_config(where) if path or where.exists() else DaemonConfig()
    except PoolError as error:
        yield str(error)
        return
    try:
        config.check(total)
    except ValueError as error:
        yield f"{where}: {error}"
    else:
        yield from _of_promises(config, total, state)
    yield from (f"{where}: {words}" for words in grants(flags, config.access).wrong)
    if address := metrics or config.metrics.listen:
        yield from _of_address(address)


def _of_promises(config: DaemonConfig, total: int, state: Path) -> Iterator[str]:
    """With what `tmemctl set` said, which goes before the file."""
    try:
        kept = read_kept(state)
    except PoolError as error:
        yield str(error)
        return
    except OSError:
        return  # another user's, perhaps
    names = {*kept, *config.pools}
    settings = [merge(kept.get(name, Overrides()), config.pools.get(name, PoolConfig())) for name in names]
    promised, there = sum(each.promised for each in settings), config.budget.maximum.of(total)
    size = config.tmpfs.size
    most = min(there, size.of(total)) if size is not None else there
    if promised > most:
        yield (
            f"minimums and fixed targets are {format_size(promised)} in all, those of {state} counted, and the host"
            f" gives at most {format_size(most)} (budget.maximum, or tmpfs.size)"
        )


def _of_address(address: Address) -> Iterator[str]:
    try:
        metricserver.bind(address).close()
    except PoolError as error:
        if not _is_tmemds(address):
            yield str(error)


def _is_tmemds(address: Address) -> bool:
    """Whether a tmemd serves metrics there already, as one does whose configuration is checked before a reload."""
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(address.host or "localhost", address.port, timeout=_TIMEOUT)
        connection.request("GET", "/metrics")
        return b"tmemd_build_info" in connection.getresponse().read(1 << 20)
    return False
