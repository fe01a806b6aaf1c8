"""What users set for each pool; tmemd keeps it, so that it outlives tmemd, the plugin and the host."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

MAX_WEIGHT: Final = 10_000  # as cgroup v2's cpu.weight
DEFAULT_WEIGHT: Final = 100


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sizes in bytes."""

    weight: Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)] = DEFAULT_WEIGHT
    cap: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] | None = None  # None: the device's own limit
    minimum: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 0
    target: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] | None = None  # None: the policy finds it
    compression: bool = True
    frozen: bool = False
