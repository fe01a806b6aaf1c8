# SPDX-License-Identifier: BSD-3-Clause
"""The memory cgroups a process runs in: at their limit the kernel kills, where a full tmpfs only says no."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_LIMITS: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def memory_limits(root: Path = Path("/")) -> list[tuple[Path, Path]]:
    """The (limit, usage) files of each memory cgroup above this process, innermost first, of version 2 and 1 alike.

    *root* stands in for / in tests. A file says 'max', or a number of bytes.
    """
    found = []
    for mount, group in _hierarchies(root):
        for directory in (mount / group, *(mount / group).parents):
            found += [
                (directory / limit, directory / usage)
                for limit, usage in _LIMITS
                if (directory / limit).is_file() and (directory / usage).is_file()
            ]
            if directory == mount:
                break
    return found


def _hierarchies(root: Path) -> list[tuple[Path, str]]:
    """Where the hierarchies that may limit memory are mounted, and this process's group in each."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    base = root / "sys/fs/cgroup"
    found = []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            found += [(base, group.lstrip("/")), (base / "unified", group.lstrip("/"))]
        elif "memory" in controllers.split(","):
            found.append((base / "memory", group.lstrip("/")))
    return found
