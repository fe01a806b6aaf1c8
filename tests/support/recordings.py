# SPDX-License-Identifier: BSD-3-Clause
"""Recordings made by hand."""

from __future__ import annotations

from typing import Any

from tests.support import fakes
from tmemd.simulation.recording import Header, PoolRecord, Record
from tmemd.store.poolfile import GENERATIONS, Ages
from tmemd.store.sample import PoolSample

HEADER = Header(started="2026-11-23T12:00:00+00:00", interval=0.5, policy="fair")
NONE = (0,) * GENERATIONS


def pool(name: str = "web", **values: Any) -> PoolRecord:
    """One pool at one record, all zero but what is given: of its counters, its ages, or itself."""
    ages = {field: values.pop(field) for field in Ages.__struct_fields__ if _is_of_ages(field, values)}
    own = {field: values.pop(field) for field in PoolSample.__struct_fields__ if field in values}
    known: dict[str, Any] = {
        "weight": 100, "minimum_bytes": 0, "cap_bytes": None, "target_bytes": 0,
        "frozen": False, "served": True, "has_file": True,
    }  # fmt: skip
    counted = Ages(**(dict.fromkeys(Ages.__struct_fields__, NONE) | {"published": 0, "generation": 0} | ages))
    sample = PoolSample(name=name, counters=fakes.counters(**values), ages=counted, **(known | own))
    return PoolRecord(sample=sample, file_read_ns=0, spill_ns=0)


def _is_of_ages(field: str, values: dict[str, Any]) -> bool:
    """Some counters have the same names."""
    return isinstance(values.get(field), tuple) or (field in {"published", "generation"} and field in values)


def record(at: float, *pools: PoolRecord, budget: int = 1 << 30) -> Record:
    return Record(at=at, budget_bytes=budget, pools=pools)
