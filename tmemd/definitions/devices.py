# SPDX-License-Identifier: BSD-3-Clause
"""The life of a device: made, started, stopped, taken away. Its definition is there first, and goes last.

While it says that it is unfinished, the device is being made or taken away; whoever is killed meanwhile leaves one that
`remove` takes away, and `create` makes from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final, TypeAlias

from tmemd import operations
from tmemd.client import Client, UnreachableError
from tmemd.definitions import accounts, definition, files, resizing, services
from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.definitions.services import Services
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size
from tmemd.store.directory import Pools
from tmemd.store.poolfile import PAGE, PoolError
from tmemd.system.greeting import greets

_INTERVAL: Final = 0.05  # seconds
_LOOK_SECONDS: Final = 1.0
_STANDBY: Final = "standby=yes"
_SETTINGS: Final = frozenset({"weight", "cap", "minimum", "compression"})

Drain: TypeAlias = Callable[[Client, PoolStatus], object]  # moves all of a pool's pages to its file


class Devices:
    """The defined devices of a host. Whatever changes one raises PoolError when it was not done."""

    def __init__(self, place: Place, served_by: Services | None = None, tell: Callable[[str], None] = print) -> None:
        """*tell* is called with what should be known of something that was done."""
        self.place = place
        self.services = served_by or services.of(place)
        self._tell = tell

    def create(self, wanted: Definition, settings: Mapping[str, Any]) -> None:
        """Make a device, with these settings of tmemd's, and start it; or leave nothing of it."""
        with self.place.changing():
            self._check_new(wanted)
            begun = replace(files.noted(wanted), is_unfinished=True)
            try:
                self._make(begun, settings)
                definition.save(self.place, replace(begun, is_unfinished=False))
            except BaseException as error:
                self._undo(begun, error)
                raise

    def _undo(self, begun: Definition, error: BaseException) -> None:
        try:
            self._take_away(begun)
        except (PoolError, OSError) as left:
            raise PoolError(
                f"{error}; and what was begun is there still ({left}): 'tmemctl remove {begun.name}' takes it away"
            ) from error

    def _check_new(self, wanted: Definition) -> None:
        """What was begun and not brought to its end goes before it is made again."""
        if self.place.definition(definition.check_name(wanted.name)).exists():
            found = definition.load(self.place, wanted.name)
            if not found.is_unfinished:
                raise PoolError(f"device {wanted.name} is there already: 'tmemctl remove {wanted.name}' takes it away")
            self._take_away(found)
        self.services.check(wanted)
        files.check(self.place, wanted)
        if self._status(wanted.name):
            raise PoolError(f"there is a pool {wanted.name}, of no device that is defined: 'tmemctl destroy' it first")

    def _make(self, begun: Definition, settings: Mapping[str, Any]) -> None:
        self.place.definitions.mkdir(parents=True, exist_ok=True)
        definition.save(self.place, begun)
        account = accounts.make(self.place, begun.name)
        files.make(self.place, begun, account)
        files.check_access(begun, account)
        self.services.install(begun)
        self.services.start(begun)
        self._await(begun.name)
        # What was kept for a device that had the name before does not hold.
        self._client.set(begun.name, **settings, forget=_SETTINGS - settings.keys())

    def start(self, name: str) -> None:
        """Start it, and return when it is served."""
        with self.place.changing():
            found = self._finished(name)
            self._check_unserved(name)
            self.services.start(found)
            self._await(name)

    def stop(self, name: str) -> None:
        """Kill its server; its pages stay, and its guest waits, until it is started."""
        with self.place.changing():
            self.services.stop(self._finished(name))

    def restart(self, name: str) -> None:
        """Kill its server and start another, to which the guest's requests go that were not answered."""
        with self.place.changing():
            found = self._finished(name)
            self._check_unserved(name)
            self.services.restart(found)
            self._await(name)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Take away all there is of it: *force*, also with clients and pages, which are lost."""
        with self.place.changing():
            found = definition.load(self.place, name)
            if not found.is_unfinished and not force:
                self._check_unused(found)
            self._take_away(definition.save(self.place, replace(found, is_unfinished=True)))

    def resize(self, name: str, size: str, drain: Drain) -> None:
        """Give it another size, as people write it; *drain* drains a pool.

        Its pool is made anew, so all its pages go to its file first. One that was served is served again afterwards, or
        with the old size, if this fails.
        """
        with self.place.changing():
            found = self._finished(name)
            wanted = replace(found, size=size)
            if found.size_bytes is None or wanted.size_bytes is None:
                raise PoolError(f"device {name} has the size of its source, {found.source}")
            _check_no_tail(found)
            resizing.check(found, self.place.pool(name), wanted.size_bytes)
            with self._replaced(found, wanted, drain):
                try:
                    self._be(wanted)
                except BaseException:
                    self._be(found)
                    raise

    def rename(self, name: str, to: str, drain: Drain) -> None:
        """Give it another name, by which guests find it from then on; *drain* drains a pool.

        Its pages go to its file first. Whoever is killed meanwhile can say the same again.
        """
        with self.place.changing():
            found = self._finished(name)
            wanted = files.renamed(self.place, found, to)
            self._check_rename(found, wanted)
            with self._replaced(found, wanted, drain):
                self.services.uninstall(name)
                files.move(self.place, found, wanted)
                accounts.rename(self.place, name, to)
                self._client.rename(name, to)
                self.services.install(definition.save(self.place, wanted))
                self.place.definition(name).unlink()
                definition.sync_directory(self.place.definitions)

    def _check_rename(self, found: Definition, wanted: Definition) -> None:
        _check_no_tail(found)
        status = self._status(found.name)
        if status and (clients := _clients(status)):
            raise PoolError(f"device {found.name} has {clients[0]}, who would look for it in vain: detach it first")
        # What was killed has moved the files, and renamed the user, before it made the new definition.
        is_begun = not self.place.home(found.name).exists() and not accounts.find(self.place, found.name)
        if self.place.definition(definition.check_name(wanted.name)).exists() and not is_begun:
            raise PoolError(f"device {wanted.name} is there already")
        files.check_moves(self.place, found, wanted)
        if self._status(wanted.name):
            raise PoolError(f"there is a pool {wanted.name} already")

    def _be(self, wanted: Definition) -> None:
        account, size = accounts.find(self.place, wanted.name), wanted.size_bytes
        if account and size:
            resizing.resize(wanted, account, size)
        definition.save(self.place, wanted)

    @contextmanager
    def _replaced(self, found: Definition, wanted: Definition, drain: Drain) -> Iterator[None]:
        """For the length of a with block nobody serves the device, and all its pages are in its file.

        Then it is served as it is *wanted*, if it was before.
        """
        was_served = self.services.states([found.name]) != ["stopped"]
        try:
            self._park(found, drain)
            yield
        except BaseException:
            with suppress(PoolError):
                if was_served:
                    self.services.start(found)
            raise
        if was_served:
            self.services.start(wanted)
            self._await(wanted.name)

    def _park(self, found: Definition, drain: Drain) -> None:
        self._drain(found, drain)  # most of it while its guest goes on
        self.services.stop(found)
        self._drain(found, drain)
        if self._status(found.name):
            self._client.destroy(found.name, keep_settings=True)

    def _drain(self, found: Definition, drain: Drain) -> None:
        status = self._status(found.name)
        if status and status.counters.pages_lost:
            raise PoolError(f"device {found.name} has lost pages with the host: swapoff and blkdiscard it in its guest")
        if status and status.has_file:
            drain(self._client, status)
        elif status and status.counters.pages_in_tmem:
            raise PoolError(f"device {found.name} has no file for its pages: swapoff and blkdiscard it in its guest")

    @property
    def _client(self) -> Client:
        return Client.of_daemon(self.place.tmemd, self._tell)

    def _finished(self, name: str) -> Definition:
        found = definition.load(self.place, name)
        if found.is_unfinished:
            raise PoolError(f"device {name} was made or removed only in part: remove it, or create it again")
        return found

    def _check_unserved(self, name: str) -> None:
        """What was started by hand is not ours to kill, and another would not start."""
        if self._is_served(name) and self.services.states([name])[0] in ("failed", "stopped"):
            raise PoolError(f"{name} is served by a process that somebody started by hand: end it first (SIGKILL)")

    def _await(self, name: str) -> None:
        """Return when the device is served. Making its backing file may take its time."""
        while not self._is_served(name):
            if self.services.states([name])[0] in ("failed", "stopped"):
                raise PoolError(f"{name} does not start: {self.services.said(name)}")
            time.sleep(_INTERVAL)

    def _is_served(self, name: str) -> bool:
        status = self._status(name)
        return status is not None and status.served and (not status.unfinished or self._stands_by(name))

    def _stands_by(self, name: str) -> bool:
        """Whether it waits for a device that another host has: it has no whole pool before that comes."""
        options = definition.load(self.place, name).options
        return _STANDBY in options and greets(self.place.socket(name), _LOOK_SECONDS)

    def _status(self, name: str) -> PoolStatus | None:
        return operations.status(Pools(self.place.pools), name, long=True)

    def _check_unused(self, found: Definition) -> None:
        reasons = []
        if status := self._status(found.name):
            reasons += _clients(status) + _pages(status, found)
        elif files.holds_data(found.backing_path):
            reasons += [f"what its backing file {found.backing} holds"]
        if reasons:
            raise PoolError(
                f"device {found.name} has {' and '.join(reasons)}: detach it in its guest first (scripts/detach), or"
                " say --force, and they are lost"
            )

    def _take_away(self, found: Definition) -> None:
        self.services.uninstall(found.name)
        self._destroy_pool(found.name)
        files.remove(self.place, found, accounts.find(self.place, found.name))
        accounts.remove(self.place, found.name)
        self.place.definition(found.name).unlink(missing_ok=True)
        definition.sync_directory(self.place.definitions)

    def _destroy_pool(self, name: str) -> None:
        """And what tmemd keeps for it, also where there is no pool now."""
        is_there = self.place.pool(name).exists()
        try:
            self._client.destroy(name, lose_pages=True)
        except UnreachableError:
            if is_there:
                Client.of_directory(self.place.pools).destroy(name, lose_pages=True)
        except PoolError:
            if is_there:
                raise


def _check_no_tail(found: Definition) -> None:
    if found.has_tail:
        raise PoolError(f"{found.backing} knows device {found.name} by name and size: remove it, and create another")


def _clients(status: PoolStatus) -> list[str]:
    count = status.doors.nbd + status.doors.vhost if status.served and status.doors else 0
    return [f"{count} clients" if count > 1 else "a client"] if count else []


def _pages(status: PoolStatus, found: Definition) -> list[str]:
    counters = status.counters
    pages = 0 if status.kind == "ephemeral" else counters.pages_in_tmem + counters.pages_lost
    # A pool that is made anew has all that its file can hold.
    if status.has_file and (found.server or files.holds_data(found.backing_path)):
        pages += counters.pages_in_file
    return [f"{format_size(pages * PAGE)} of pages"] if pages else []
