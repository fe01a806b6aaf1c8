# SPDX-License-Identifier: BSD-3-Clause
"""Why targets changed, in words, for tmemd's log. docs/monitoring.md says what each cause means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tmemd.governor.budget import Budget
from tmemd.governor.observer import Observation
from tmemd.policy import Demand
from tmemd.sizes import format_size


def explain(
    observed: Mapping[str, Observation], demands: Sequence[Demand], shares: Mapping[str, int],
    targets: Mapping[str, int], *, budget: Budget, overdrawn: Collection[int],
) -> str:  # fmt: skip
    """'web 64.0M -> 80.0M (demand), ...' for each served pool whose target was another before; '' where none was.

    *demands* are of the pools that the policy decides about, *shares* what it gave, *targets* what they have now;
    *overdrawn*: users whose idle pools take more than their share.
    """
    by_name = {each.name: each for each in demands}
    changes = []
    for name, each in observed.items():
        if each.sample and each.control and targets[name] != each.control.target:
            limit = each.sample.counters.limit_bytes
            old = limit if each.control.target is None else min(limit, each.control.target)
            cause = _cause(each, by_name.get(name), shares[name], targets[name], overdrawn) or (
                budget.cause if budget.change * (targets[name] - old) > 0 else "demand"
            )
            changes.append(f"{name} {format_size(old)} -> {format_size(targets[name])} ({cause})")
    return ", ".join(changes)


def _cause(each: Observation, demand: Demand | None, share: int, target: int, overdrawn: Collection[int]) -> str:
    """'' where the policy was free to decide."""
    if demand is None:
        return "pinned" if each.settings.pinned is not None else "frozen"
    if target < share:
        return f"owed: {format_size(share)} once others have given memory back"
    if not demand.has_file:
        return "without file"
    if each.owner in overdrawn:
        return "idle pools of the same user"
    return "cap" if target == demand.cap else "minimum" if target == demand.minimum else ""
