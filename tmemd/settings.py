"""What users set for each pool; tmemd keeps it, so that it outlives tmemd, the plugin and the host.

What `tmemctl set` said goes before the configuration file's [pools.NAME], and that before the defaults.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from tmemd.store.poolfile import NAME_PATTERN, PoolError

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
    """The state file: what was set for each pool, those included that are not there now, for a device comes back."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one, and keep other processes from using it. Raises PoolError."""
        self.path = path
        with ExitStack() as undo:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context(path.with_name(path.name + ".lock").open("w"))
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._pools: Mapping[str, Overrides] = _read(path)
            except BlockingIOError:
                raise PoolError(f"another tmemd keeps its settings in {path}: say --state") from None
            except OSError as error:
                raise PoolError(f"cannot keep settings in {path}: {error.strerror}") from None
            undo.pop_all()

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    def names(self) -> list[str]:
        """The pools that something is kept for."""
        return sorted(self._pools)

    def of(self, name: str) -> Overrides:
        """What was set for that pool."""
        return self._pools.get(name, Overrides())

    def change(self, changes: Mapping[str, Overrides]) -> None:
        """Replace what is kept for these pools, all or none. Raises PoolError.

        It is on disk when this returns, which can take as long as the disk is busy. Any thread may call it, one at a
        time; until it returns the others see what was kept before.
        """
        pools = {**self._pools, **changes}
        self._replace({name: overrides for name, overrides in pools.items() if not overrides.is_empty})

    def _replace(self, pools: Mapping[str, Overrides]) -> None:
        if pools == self._pools:
            return
        text = msgspec.json.format(msgspec.json.encode(_State(2, dict(sorted(pools.items())))), indent=2)
        try:
            _write_atomically(self.path, text + b"\n")
        except OSError as error:
            raise PoolError(f"cannot keep settings in {self.path}: {error.strerror}") from None
        self._pools = pools


def _read(path: Path) -> Mapping[str, Overrides]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State).pools
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PoolError(f"{path}: the kept settings are damaged ({error}): mend the file, or move it away") from None


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
