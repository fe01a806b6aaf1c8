# SPDX-License-Identifier: BSD-3-Clause
"""What tmemd does by itself: sets targets, looks for pools that come and go, and tries again what failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tmemd.daemon import metricserver
from tmemd.daemon.administration import Administration
from tmemd.daemon.metrics import Snapshot, TickTimes
from tmemd.daemon.metricserver import MetricsServer
from tmemd.daemonconfig import Address, DaemonConfig, read_config
from tmemd.events import Watcher
from tmemd.governor.governor import TICK, Governor
from tmemd.governor.host import total_memory
from tmemd.protocol import HostStatus
from tmemd.store.poolfile import PoolError

_log: Final = logging.getLogger("tmemd")
_SCAN_INTERVAL: Final = 5.0  # seconds between two looks at the directory


class Maintenance:
    """Looks after the pools that *administration* has, and has *governor* give them targets."""

    def __init__(
        self,
        administration: Administration,
        governor: Governor,
        *,
        config: Path | None = None,
        metrics: Address | None = None,
        prepare: Callable[[], None] = lambda: None,
        configured: Callable[[DaemonConfig], None] = lambda _: None,
    ) -> None:
        """*config* is the file to read again when that is asked for; *metrics* goes before what is configured.

        *prepare* makes the pools' directory fit for pools again, if its tmpfs was unmounted say, or raises PoolError.
        *configured* is told of each configuration that was read again.
        """
        self._administration = administration
        self._governor = governor
        self._problems = administration.problems
        self._config = config
        self._metrics = metrics
        self._prepare = prepare
        self._configured = configured
        self._look_now = asyncio.Event()
        self._reload = False
        self._publishing: tuple[Address, asyncio.Task[None]] | None = None
        self._ticks = TickTimes()
        self._watcher = Watcher()
        self._unusable: set[str] = set()

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Look once, and let *group* go on with it until it is cancelled."""
        await self._look(group)
        for task in (self._look_after(group), self._retry_settings(), self._govern()):
            group.create_task(task)

    def reload(self) -> None:
        """Read the configuration again, soon; one that cannot be used is a problem, and the one before stays."""
        self._reload = True
        self._look_now.set()

    async def snapshot(self) -> Snapshot:
        """What Prometheus gets. Everybody else has a turn after each pool. Raises PoolError."""
        pools = []
        for name in self._administration.pools.names():
            with suppress(PoolError):
                if status := self._administration.status(name):
                    pools.append(self._governor.measured(status))
            await asyncio.sleep(0)
        return Snapshot(pools, self._host(), self._ticks, self._problems.all())

    def _host(self) -> HostStatus | None:
        with suppress(PoolError, OSError):
            return self._governor.status
        return None

    async def _govern(self) -> None:
        """Set targets tick by tick. Whatever goes wrong in one, devices go on with the targets they have."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                with self._ticks.time():
                    self._governor.tick()
            except Exception as error:
                words = f"targets stay as they are: {error}"
                if self._problems.of("targets") != words and not isinstance(error, PoolError | OSError):
                    _log.exception("a mistake of ours")
                self._problems.note("targets", words)
            else:
                self._problems.note("targets", None)
            self._tell(began)
            await asyncio.sleep(began + TICK - loop.time())

    def _tell(self, now: float) -> None:
        """Have who waits hear of what happened."""
        self._administration.journal.add(self._watcher.look(self._governor.seen(), self._problems.all(), now))

    async def _retry_settings(self) -> None:
        """A task of its own, for the disk that settings are on may hang."""
        while True:
            await asyncio.sleep(_SCAN_INTERVAL)
            if self._problems.of("settings"):
                async with self._administration.changing:
                    await self._administration.retry()
                self._adopt()

    async def _look_after(self, group: asyncio.TaskGroup) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), _SCAN_INTERVAL)
            self._look_now.clear()
            try:
                await self._look(group)
            except Exception as error:
                _log.exception("pools are not looked after: %s", error)

    async def _look(self, group: asyncio.TaskGroup) -> None:
        """Find pools that others made or removed, and try again what failed.

        The memory of a removed pool is only free once we close its file.
        """
        self._read_configuration()
        if self._problems.of("access"):  # an account that was not there may be by now
            self._configured(self._administration.config)
        self._check_directory()
        self._adopt()
        await self._publish(group)

    def _read_configuration(self) -> None:
        """Where it was asked for, and after that until it can be used."""
        wanted, self._reload = self._reload, False
        if not wanted and self._problems.of("configuration") is None:
            return
        try:
            config = read_config(self._config, total_memory())
        except PoolError as error:
            if wanted or not str(self._problems.of("configuration")).startswith(str(error)):
                self._problems.note("configuration", f"{error}; the configuration stays as it was")
            return
        self._administration.configure(config)
        self._governor.configure(config)
        self._configured(config)
        self._problems.note("configuration", None)
        self._adopt()
        _log.info("configuration read again")

    def _check_directory(self) -> None:
        """Pools that were made below an unmounted tmpfs would lie on a disk, and vanish when it is mounted again."""
        pools = self._administration.pools
        try:
            pools.check_directory()
        except PoolError as error:
            try:
                self._prepare()
                pools.follow_directory()
            except PoolError as reason:
                words = f"{error}, and cannot be had again ({reason}): no device attaches until it is mounted"
                self._problems.note("pools", f"{words}; trying again")
                return
            _log.warning("%s; it was mounted again, and pools begin anew: restart the devices that are served", error)
        self._problems.note("pools", None)

    def _adopt(self) -> None:
        try:
            failed = self._administration.adopt()
        except PoolError as error:
            _log.warning("%s", error)
            return
        for name in sorted(failed - self._unusable):
            _log.warning("pool %s cannot be used", name)
        self._unusable = failed

    async def _publish(self, group: asyncio.TaskGroup) -> None:
        """Serve metrics where they are wanted now, as soon as there is such an address."""
        wanted = self._metrics or self._administration.config.metrics.listen
        address, task = self._publishing or (None, None)
        if wanted != address and task:
            task.cancel()
            self._publishing = None
            await asyncio.wait([task])
        if wanted and self._publishing is None:
            try:
                listener = await asyncio.to_thread(metricserver.listen, wanted)
            except PoolError as error:
                self._problems.note("metrics", f"{error}; trying again")
                return
            self._publishing = wanted, group.create_task(MetricsServer(listener, self.snapshot).run())
        self._problems.note("metrics", None)
