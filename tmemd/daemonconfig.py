# SPDX-License-Identifier: BSD-3-Clause
"""tmemd's configuration file, in TOML. scripts/tmemd.toml.example shows every key with its default.

Sizes are strings in nbdkit's notation ('512M'); those of the budget may be a share of the host's RAM ('50%') as well.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from tmemd.policy import DEFAULT, by_name
from tmemd.settings import MAX_WEIGHT
from tmemd.sizes import format_size, parse_size
from tmemd.store.poolfile import NAME_RULE, PoolError, is_name
from tmemd.suggestions import suggestion

DEFAULT_TMPFS: Final = "50%"
DEFAULT_PATH: Final = Path("/etc/tmemd/tmemd.toml")
_PERCENT: Final = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%", re.ASCII)
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]*):(\d{1,5})", re.ASCII)
_MAX_USER_POOLS: Final = 1 << 20

Weight = Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)]
Account = str | Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class ConfigFileError(PoolError):
    """The configuration file cannot be used; the message names the file, the key and what is allowed."""


class Size(int):
    """Bytes."""

    @classmethod
    def parse(cls, value: object) -> Size:
        """From '512M', or from a number of bytes. Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("expected a size, such as '512M' or '8G'")
        return cls(parse_size(str(value)))


class Amount(str):
    """Bytes, or a share of the host's RAM; kept as it was written, for how much RAM there is is known only later."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Amount:
        """From '50%', '512M', or a number of bytes. Raises ValueError."""
        if isinstance(value, str) and value.endswith("%"):
            match = _PERCENT.fullmatch(value)
            if not match or float(match[1]) > 100:
                raise ValueError(f"{value!r} is not 0% to 100%")
        else:
            try:
                Size.parse(value)
            except ValueError as error:
                raise ValueError(f"{error}, or a share of the host's RAM, such as '50%'") from None
        return cls(value)

    def of(self, total: int) -> int:
        """In bytes, on a host with *total* bytes of RAM."""
        if self.endswith("%"):
            return int(total * float(self[:-1]) / 100)
        return parse_size(self)


class Address(str):
    """Where to listen: HOST:PORT, '[::1]:PORT', or ':PORT' for every address."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Address:
        """Check it. Raises ValueError."""
        match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
        if not match or not 0 < int(match[2]) < 1 << 16:
            raise ValueError(f"{value!r} is not HOST:PORT, such as '127.0.0.1:9632'")
        return cls(value)

    @property
    def host(self) -> str:
        """The host's name or address; '' for every address."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.rpartition(":")[2])


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class AccessConfig(_Table, frozen=True):
    """Who may connect, and whose plugins may attach, by name or number. UNSET: the group tmemd, if there is one."""

    group: Account | msgspec.UnsetType = msgspec.UNSET
    allow_users: tuple[Account, ...] = ()
    allow_groups: tuple[Account, ...] | msgspec.UnsetType = msgspec.UNSET


class TmpfsConfig(_Table, frozen=True):
    """Where pools lie."""

    size: Amount | None = None  # None: tmemd mounts none, and tmemd --prepare one of DEFAULT_TMPFS


class BudgetConfig(_Table, frozen=True):
    """What all pools together may take of the host's RAM."""

    minimum: Amount = Amount("0")  # however short the host is of memory
    maximum: Amount = Amount("50%")
    reserve: Amount = Amount("10%")  # what is to stay available on the host
    pressure: Percent = 10.0  # percent of the time that tasks may wait for memory before pools shrink


class DemotionConfig(_Table, frozen=True):
    """What demotion may do."""

    writes_per_hour: Size | None = None  # bytes written to all backing files together; None: no bound


class MetricsConfig(_Table, frozen=True):
    """Where Prometheus asks."""

    listen: Address | None = None  # None: nowhere


class PoolConfig(_Table, frozen=True):
    """What `tmemctl set` did not say of a pool. UNSET: the default."""

    weight: Weight | msgspec.UnsetType = msgspec.UNSET
    cap: Size | msgspec.UnsetType = msgspec.UNSET
    minimum: Size | msgspec.UnsetType = msgspec.UNSET
    compression: bool | msgspec.UnsetType = msgspec.UNSET


class DaemonConfig(_Table, frozen=True):
    """All of it."""

    policy: str = DEFAULT  # by name; tmemd.policy knows which there are
    pools_per_user: Annotated[int, msgspec.Meta(ge=0, le=_MAX_USER_POOLS)] = 64  # of each who is no administrator
    access: AccessConfig = AccessConfig()
    tmpfs: TmpfsConfig = TmpfsConfig()
    budget: BudgetConfig = BudgetConfig()
    demotion: DemotionConfig = DemotionConfig()
    metrics: MetricsConfig = MetricsConfig()
    pools: dict[str, PoolConfig] = {}

    def check(self, total: int) -> None:
        """Check what depends on how many bytes of RAM the host has. Raises ValueError, naming the key."""
        maximum = self.budget.maximum.of(total)
        if self.budget.minimum.of(total) > maximum:
            raise ValueError(
                f"budget.minimum: {self.budget.minimum} is more than budget.maximum, {self.budget.maximum}"
            )
        promised = sum(pool.minimum or 0 for pool in self.pools.values())
        if promised > maximum:
            sizes = f"{format_size(promised)} in all are more than budget.maximum, {format_size(maximum)}"
            raise ValueError(f"pools: minimums of {sizes}")


def read_config(path: Path | None, total: int) -> DaemonConfig:
    """The file's content, checked for a host with *total* bytes of RAM. None: the usual file, if it is there.

    Raises ConfigFileError.
    """
    if path is None and not DEFAULT_PATH.exists():
        return DaemonConfig()
    config = load_config(path or DEFAULT_PATH)
    try:
        config.check(total)
    except ValueError as error:
        raise ConfigFileError(f"{path or DEFAULT_PATH}: {error}") from None
    return config


def load_config(path: Path) -> DaemonConfig:
    """Read the file. Raises ConfigFileError."""
    try:
        return parse_config(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError among them
        raise ConfigFileError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from None


def parse_config(text: str) -> DaemonConfig:
    """Read the text of a file. Raises ValueError, naming the key."""
    tables = tomllib.loads(text)
    pools = tables.pop("pools", {})
    if not isinstance(pools, dict):
        raise ValueError("pools: expected tables, [pools.NAME]")
    named = {_name(name): _pool(name, table) for name, table in pools.items()}
    for key, kind in _SECTIONS.items():
        tables[key] = _convert(tables.get(key, {}), kind, key)
    config: DaemonConfig = _convert(tables, DaemonConfig, "")
    if config.tmpfs.size is not None and config.tmpfs.size.of(100) == 0:
        raise ValueError("tmpfs.size: a size of 0 would let the tmpfs take all RAM")
    try:
        by_name(config.policy)
    except ValueError as error:
        raise ValueError(f"policy: {error}") from None
    return msgspec.structs.replace(config, pools=named)


_SECTIONS: Final = {
    "access": AccessConfig,
    "tmpfs": TmpfsConfig,
    "budget": BudgetConfig,
    "demotion": DemotionConfig,
    "metrics": MetricsConfig,
}


def _name(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"pools.{name!r}: {NAME_RULE}")
    return name


def _pool(name: str, table: object) -> PoolConfig:
    pool: PoolConfig = _convert(table, PoolConfig, f"pools.{name}")
    if pool.cap is not msgspec.UNSET and pool.minimum is not msgspec.UNSET and pool.cap < pool.minimum:
        raise ValueError(f"pools.{name}.cap: {format_size(pool.cap)} is below its minimum, {format_size(pool.minimum)}")
    return pool


def _convert(table: object, kind: type[Any], where: str) -> Any:
    known = kind.__struct_fields__
    dot = "." if where else ""
    for key in table if isinstance(table, dict) else ():
        if key not in known:
            raise ValueError(
                f"{where}{dot}{key}: there is no such key; known are {', '.join(known)}{suggestion(key, known)}"
            )
    try:
        made = msgspec.convert(table, kind, dec_hook=lambda wanted, value: wanted.parse(value))
    except msgspec.ValidationError as error:
        reason, _, key = str(error).replace("`object`", "a table").partition(" - at `$")
        raise ValueError(f"{where}{key.rstrip('`') if where else key.strip('.`')}: {reason}") from None
    # What is sent and kept further on must be plain numbers, or msgspec would not encode them.
    sizes = {field: int(value) for field, value in msgspec.structs.asdict(made).items() if isinstance(value, Size)}
    return msgspec.structs.replace(made, **sizes)
