# SPDX-License-Identifier: BSD-3-Clause
"""What users set for each pool; tmemd keeps it, so that it outlives tmemd, the plugin and the host.

What `tmemctl set` said goes before the configuration file's [pools.NAME], and that before the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from tmemd.store.poolfile import NAME_PATTERN, PoolError
from tmemd.system.locks import open_lock_file

DEFAULT_STATE: Final = Path("/var/lib/tmemd/settings.json")
MAX_WEIGHT: Final = 10_000  # as cgroup v2's cpu.weight
DEFAULT_WEIGHT: Final = 100

_Weight: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)]
_Uid: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sizes in bytes."""

    weight: _Weight = DEFAULT_WEIGHT
    cap: _Bytes | None = None  # None: the device's own limit
    minimum: _Bytes = 0
    target: _Bytes | None = None  # None: the policy finds it
    compression: bool = True
    frozen: bool = False

    @property
    def pinned(self) -> int | None:
        """The target that holds, in bytes; None: the policy finds it. A cap that came later goes before it."""
        return self.target if self.target is None or self.cap is None else min(self.target, self.cap)

    @property
    def promised(self) -> int:
        """Bytes of RAM that no policy may give to another pool."""
        return self.minimum if self.pinned is None else self.pinned


class Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What was set for one pool; UNSET: nothing was. Sizes in bytes."""

    weight: _Weight | msgspec.UnsetType = msgspec.UNSET
    cap: _Bytes | msgspec.UnsetType | None = msgspec.UNSET
    minimum: _Bytes | msgspec.UnsetType = msgspec.UNSET
    target: _Bytes | msgspec.UnsetType | None = msgspec.UNSET
    compression: bool | msgspec.UnsetType = msgspec.UNSET
    frozen: bool | msgspec.UnsetType = msgspec.UNSET
    owner: _Uid | msgspec.UnsetType = msgspec.UNSET  # of the pool it was set for; UNSET: set before that was kept

    @property
    def is_empty(self) -> bool:
        """Whether nothing was set."""
        return msgspec.structs.replace(self, owner=msgspec.UNSET) == Overrides()


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state file. Version 1 had no owners."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2)]
    pools: dict[Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)], Overrides]


def merge(*sources: object) -> PoolSettings:
    """What holds, from the attributes of *sources* that are there and not UNSET: those of the first go first."""
    values = {}
    for field in PoolSettings.__struct_fields__:
        given = (getattr(source, field, msgspec.UNSET) for source in sources)
        values[field] = next((value for value in given if value is not msgspec.UNSET), msgspec.UNSET)
    return PoolSettings(**{field: value for field, value in values.items() if value is not msgspec.UNSET})


class SettingsStore:
    """The state file: what was set for each pool, those included that are not there now, for a device comes back.

    What cannot be written holds all the same, and is written as soon as it can be; `problem` says why it is not.
    A file that cannot be read stays as it is until somebody mends it or moves it away; what it says comes back then.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one, and keep other processes from using it. Raises PoolError if another does."""
        self.path = path
        self.problem: str | None = None
        self._lock: int | None = None
        self._kept: Mapping[str, Overrides] | None = None  # on disk; None: that is not known
        self._waiting: Mapping[str, Overrides] = {}  # to be written; goes before that
        self._save({})
        if self._lock is None and self.problem == self._in_use:
            raise PoolError(self.problem)

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _in_use(self) -> str:
        return f"another tmemd keeps its settings in {self.path}: say --state"

    def names(self) -> list[str]:
        """The pools that something was set for."""
        return sorted(_without_empty({**(self._kept or {}), **self._waiting}))

    def of(self, name: str) -> Overrides:
        """What was set for that pool."""
        return self._waiting.get(name) or (self._kept or {}).get(name, Overrides())

    def change(self, changes: Mapping[str, Overrides]) -> None:
        """Replace what was set for these pools, all or none.

        It is on disk when this returns, unless there is a `problem` then. That can take as long as the disk is busy.
        Any thread may call it, one at a time; until it returns the others see what was set before.
        """
        self._save(changes)

    def _save(self, changes: Mapping[str, Overrides]) -> None:
        kept, waiting, problem = self._kept, {**self._waiting, **changes}, None
        try:
            if self._lock is None:
                self._lock = _lock(self.path)
            if kept is None:
                kept = read_kept(self.path)
                waiting = {name: _over(kept.get(name, Overrides()), new) for name, new in waiting.items()}
            pools = _without_empty({**kept, **waiting})
            if pools != kept:
                _write_atomically(self.path, _encoded(pools))
            kept, waiting = pools, {}
        except BlockingIOError:
            problem = self._in_use
        except PoolError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"cannot keep settings in {self.path}: {error.strerror}; what is set holds until tmemd ends, and is"
                " written as soon as it can be"
            )
        self._kept = kept
        self._waiting, self.problem = waiting, problem


def _lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open_lock_file(path.with_name(path.name + ".lock"))


def _without_empty(pools: Mapping[str, Overrides]) -> dict[str, Overrides]:
    return {name: overrides for name, overrides in pools.items() if not overrides.is_empty}


def _over(kept: Overrides, new: Overrides) -> Overrides:
    """What was set while it was not known what is *kept*: of one owner's pool, what is new goes before that."""
    of_another = msgspec.UNSET not in (kept.owner, new.owner) and kept.owner != new.owner
    if new.is_empty or of_another:
        return new
    return changed(kept, **msgspec.structs.asdict(new))


def _encoded(pools: Mapping[str, Overrides]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_State(2, dict(sorted(pools.items())))), indent=2) + b"\n"


def read_kept(path: Path) -> Mapping[str, Overrides]:
    """What a state file says was set, whoever uses it now; nothing where there is none. Raises PoolError, OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State).pools
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PoolError(
            f"{path}: the kept settings are damaged ({error}): mend the file, or move it away; until then what it says"
            " does not hold, and what is set holds until tmemd ends"
        ) from None


def _write_atomically(path: Path, data: bytes) -> None:
    """Whenever the host dies, *path* is as before or has all of *data*."""
    new = path.with_name(path.name + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def changed(before: Overrides, *, forget: Iterable[str] = (), **fields: Any) -> Overrides:
    """*before* with those of *fields* that are not UNSET, and without those in *forget*."""
    given = {field: value for field, value in fields.items() if value is not msgspec.UNSET}
    return msgspec.structs.replace(before, **given, **dict.fromkeys(forget, msgspec.UNSET))
