# SPDX-License-Identifier: BSD-3-Clause
"""What a guest's end says of its device, and a second chance where it says nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

BOOTED, ENDED = "guest: up", "guest: swapoff succeeded"
KILLED = (124, 137)  # timeout's exit status, for SIGTERM and SIGKILL
IDLE_SECONDS = 30.0  # a guest that asks for nothing for so long has stopped

T = TypeVar("T")


class HarnessError(Exception):
    """The evidence is incomplete: the harness broke, which says nothing of the device."""


def is_idle(requests: Iterable[tuple[float, int]]) -> bool:
    """Whether nothing was asked of the device in the last seconds, by its count of requests at moments in seconds."""
    *before, (end, count) = requests
    return all(number == count for at, number in before if at > end - IDLE_SECONDS)


def guest_faults(log: str, status: int, *, idle: bool) -> list[str]:
    """The device's faults as far as the guest tells: by its *log*, and the exit status of boot-guest under timeout.

    *idle*: whether the device was asked for nothing in the end. HarnessError when there is no telling.
    """
    if BOOTED not in log:
        raise HarnessError(f"the guest did not boot (status {status})")
    if status in KILLED and ENDED not in log:
        if not idle:
            raise HarnessError("the guest worked on until its time was over")
        return ["the guest stopped in the middle"]
    if status:
        return [f"the guest ended with status {status}"]
    verdict = re.search(r"hog: \d+ MiB verified, \d+ MiB came back from swap, (\d+) pages wrong", log)
    if not verdict or ENDED not in log or "guest: dmesg is clean" not in log:
        raise HarnessError("lines of the guest are missing")
    return [f"{verdict[1]} pages came back wrong"] if int(verdict[1]) else []


def second_chance(run: Callable[[], T]) -> T:
    """What *run* returns; it is run once more, and that is said, if the harness broke."""
    try:
        return run()
    except HarnessError as error:
        warnings.warn(f"the harness broke, and all is done once more: {error}", stacklevel=2)
    return run()
