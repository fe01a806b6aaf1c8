# SPDX-License-Identifier: BSD-3-Clause
"""A host's /proc and /sys as files."""

from __future__ import annotations

from pathlib import Path

MEMINFO = """\
MemTotal:        8388608 kB
MemFree:          524288 kB
MemAvailable:    4194304 kB
Buffers:           10240 kB
Cached:          3670016 kB
Shmem:            102400 kB
Active:          1048576 kB
Inactive:        2097152 kB
Slab:             204800 kB
"""


def tree(root: Path, files: dict[str, object]) -> Path:
    """A host with 8 GiB, of which 4 are available; *files* are added."""
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}".rstrip() + "\n")
    return root
