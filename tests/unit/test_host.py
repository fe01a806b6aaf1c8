# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.hosts import tree
from tmemd.governor.host import Memory, Stalls, read_memory
from tmemd.store.poolfile import PoolError

RECORDED = Path(__file__).parent / "data/host"  # Linux 6.18, cgroups of version 1 without limits
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
STALLS = """\
some avg10=1.00 avg60=0.50 avg300=0.10 total={}
full avg10=0.20 avg60=0.10 avg300=0.00 total={}
"""
UNLIMITED = 9223372036854771712  # what version 1 says for no limit


def test_a_recorded_host() -> None:
    (memory,) = read_memory(RECORDED)
    words = {line.split()[0]: int(line.split()[1]) * KIB for line in (RECORDED / "proc/meminfo").open()}
    assert (memory.total, memory.available) == (words["MemTotal:"], words["MemAvailable:"])
    lines = [line.split() for line in (RECORDED / "proc/pressure/memory").open()]
    assert memory.stalls == Stalls(*(int(words[-1].removeprefix("total=")) for words in lines))


def test_this_host_and_psutil_are_left_as_they_were(tmp_path: Path) -> None:
    read_memory(tree(tmp_path, {}))
    assert psutil.PROCFS_PATH == "/proc"
    memory = read_memory()[0]
    assert 0 < memory.available <= memory.total


def test_without_pressure_and_cgroups_there_is_the_host_alone(tmp_path: Path) -> None:
    assert read_memory(tree(tmp_path, {})) == [Memory(8 * GIB, 4 * GIB, None)]


def test_pressure_that_is_disabled_or_nonsense_is_not_known(tmp_path: Path) -> None:
    for text in ("", "some avg10=0.00", "some total=x\nfull total=1", "some avg10=0.00 total=5"):
        assert read_memory(tree(tmp_path, {"proc/pressure/memory": text}))[0].stalls is None
    tree(tmp_path, {"proc/pressure/memory": STALLS.format(1234567, 890)})
    assert read_memory(tmp_path)[0].stalls == Stalls(1234567, 890)


@pytest.mark.parametrize("text", ["", "MemTotal:", "MemTotal: many kB", "Hello: 1 kB"])
def test_a_host_that_says_nothing_of_its_memory_is_an_error(tmp_path: Path, text: str) -> None:
    tree(tmp_path, {"proc/meminfo": text})
    with pytest.raises(PoolError, match="proc/meminfo"):
        read_memory(tmp_path)
    (tmp_path / "proc/meminfo").unlink()
    with pytest.raises(PoolError, match="proc/meminfo"):
        read_memory(tmp_path)
    assert psutil.PROCFS_PATH == "/proc"


GROUP = "sys/fs/cgroup/box/tmemd"


def test_a_version_2_cgroup_with_a_limit(tmp_path: Path) -> None:
    tree(tmp_path, {
        "proc/self/cgroup": "0::/box/tmemd",
        f"{GROUP}/memory.max": GIB,
        f"{GROUP}/memory.high": "max",
        f"{GROUP}/memory.current": 700 * MIB,
        f"{GROUP}/memory.stat": f"anon 5\nfile 9\ninactive_file {100 * MIB}\nactive_file {50 * MIB}\nshmem 7",
        f"{GROUP}/memory.pressure": STALLS.format(20, 10),
        "sys/fs/cgroup/box/memory.max": "max",
        "sys/fs/cgroup/box/memory.current": 5 * GIB,
    })  # fmt: skip
    host, group = read_memory(tmp_path)
    assert host.total == 8 * GIB
    assert group == Memory(GIB, (1024 - 700 + 150) * MIB, Stalls(20, 10))


def test_memory_high_binds_as_well(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/box/tmemd",
        f"{GROUP}/memory.max": "max",
        f"{GROUP}/memory.high": 500 * MIB,
        f"{GROUP}/memory.current": 600 * MIB,
    }
    assert read_memory(tree(tmp_path, files))[1] == Memory(500 * MIB, 0, None)


def test_the_cgroups_above_bind_as_well(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/box/tmemd",
        f"{GROUP}/memory.max": 2 * GIB,
        f"{GROUP}/memory.current": GIB,
        "sys/fs/cgroup/box/memory.max": 3 * GIB,
        "sys/fs/cgroup/box/memory.current": 3 * GIB - MIB,
    }
    assert [memory.available for memory in read_memory(tree(tmp_path, files))] == [4 * GIB, GIB, MIB]


def test_version_1_cgroups(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files: dict[str, object] = {
        "proc/self/cgroup": "4:memory:/jobs/one\n1:cpu:/\n0::/",
        f"{base}/memory.limit_in_bytes": UNLIMITED,
        f"{base}/memory.usage_in_bytes": GIB,
        f"{base}/jobs/memory.limit_in_bytes": UNLIMITED,
        f"{base}/jobs/memory.usage_in_bytes": GIB,
        f"{base}/jobs/one/memory.limit_in_bytes": 256 * MIB,
        f"{base}/jobs/one/memory.usage_in_bytes": 200 * MIB,
        f"{base}/jobs/one/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {40 * MIB}\nx",
    }
    assert read_memory(tree(tmp_path, files))[1:] == [Memory(256 * MIB, 96 * MIB, None)]


def test_cgroup_files_that_vanish_or_say_nonsense_do_not_bind(tmp_path: Path) -> None:
    files: dict[str, object] = {"proc/self/cgroup": "0::/box/tmemd", f"{GROUP}/memory.max": GIB}
    assert len(read_memory(tree(tmp_path, files))) == 1
    assert len(read_memory(tree(tmp_path, {f"{GROUP}/memory.current": "lots"}))) == 1
    assert len(read_memory(tree(tmp_path, {f"{GROUP}/memory.current": MIB, f"{GROUP}/memory.max": "-5"}))) == 1
