# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import fakes
from tests.support.hosts import tree
from tests.support.mounts import mountable
from tmemd import operations
from tmemd.daemonconfig import DaemonConfig, parse_config
from tmemd.governor import governor
from tmemd.governor.governor import Governor, limit_raises
from tmemd.governor.observer import Observer
from tmemd.policy import Demand
from tmemd.protocol import Attach
from tmemd.settings import PoolSettings
from tmemd.store import poolfile
from tmemd.store.directory import Pools
from tmemd.store.poolfile import PAGE, PoolError
from tmemd.system.tmpfs import mount_tmpfs

MIB, GIB = 1 << 20, 1 << 30
MEMINFO = """\
MemTotal: {total} kB
MemFree: {free} kB
MemAvailable: {available} kB
Buffers: 0 kB
Cached: 0 kB
Shmem: 0 kB
Active: 0 kB
Inactive: 0 kB
"""
CONFIG = """
policy = "static"
[budget]
minimum = "16M"
maximum = "50%"
reserve = "100M"
"""


class Host:
    """A fake host of 1000 MiB, real pool files, and the governor's time."""

    def __init__(self, base: Path, held: ExitStack, config: str = CONFIG) -> None:
        self.root = base / "root"
        self.directory = base / "pools"
        self.directory.mkdir(exist_ok=True)
        self._held = held
        self._fds: dict[str, int] = {}
        self.time = 0.0
        self.stalls = 0
        self.settings: dict[str, PoolSettings] = {}
        self.memory(1000)
        self.pools = Pools(self.directory, keep=True)
        held.callback(self.pools.close)
        self.start(config)

    def start(self, config: str = CONFIG) -> None:
        """A governor that knows nothing yet."""
        self.governor = Governor(self.pools, self.of, parse_config(config), root=self.root, clock=lambda: self.time)

    def of(self, name: str) -> PoolSettings:
        """What was set for a pool."""
        return self.settings.get(name, PoolSettings())

    def set(self, name: str, **values: int | None) -> None:
        """Change what was set for a pool."""
        self.settings[name] = msgspec.structs.replace(self.of(name), **values)

    def memory(self, available: int, free: int | None = None, stalled: float = 0.0) -> None:
        """MiB, and for how many seconds some task waited."""
        self.stalls += int(stalled * 1e6)
        kib = {"total": 1000 << 10, "available": available << 10, "free": (available if free is None else free) << 10}
        stalls = f"some avg10=0 total={self.stalls}\nfull avg10=0 total={self.stalls // 2}"
        tree(self.root, {"proc/meminfo": MEMINFO.format(**kib), "proc/pressure/memory": stalls})

    def pool(
        self, name: str, taken: int = 0, *,
        served: bool = True, has_file: bool = True, ephemeral: bool = False, **values: int,
    ) -> int:  # fmt: skip
        """A pool of a device of 64 MiB that takes *taken* MiB; returns its file, locked as by a plugin if *served*."""
        fd = self._held.enter_context(
            fakes.pool(self.directory, name, has_file=has_file, ephemeral=ephemeral, **values)
        )
        self._fds[name] = fd
        self.use(name, taken)
        fakes.write_counters(fd, fakes.counters(**({"used_bytes": self.taken(name)} | values)))
        if served:
            assert poolfile.lock(fd)
        self.pools.adopt_all()
        return fd

    def use(self, name: str, taken: int, **values: int) -> None:
        """Let it take so many MiB."""
        fd = self._fds[name]
        made = poolfile.read_identity(fd, name)
        assert made
        if taken:
            os.posix_fallocate(fd, made.data_offset, taken * MIB)
        fakes.write_counters(fd, fakes.counters(**({"used_bytes": self.taken(name)} | values)))

    def taken(self, name: str) -> int:
        """Bytes."""
        return os.fstat(self._fds[name]).st_blocks * 512

    def tick(self, times: int = 1) -> None:
        """Half a second each."""
        for _ in range(times):
            self.time += 0.5
            self.governor.tick()

    def files(self) -> list[int]:
        """Of all pools."""
        return list(self._fds.values())

    def target(self, name: str) -> int | None:
        """Bytes."""
        return poolfile.read_control(self._fds[name]).target


MakeHost = Callable[..., Host]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have pools of other users")


@pytest.fixture
def make() -> Iterator[MakeHost]:
    with fakes.on_tmpfs() as base, ExitStack() as held:
        yield lambda config=CONFIG: Host(base, held, config)


@pytest.fixture
def host(make: MakeHost) -> Host:
    return make()


def test_the_budget_is_shared_out_by_the_policy(host: Host) -> None:
    host.set("a", weight=300)
    for name in "ab":
        host.pool(name, limit_bytes=GIB)
        poolfile.write_target(host.pools.kept()[-1].fd, 250 * MIB)
    host.tick()
    assert host.governor.status.budget_bytes == 500 * MIB
    assert (host.target("a"), host.target("b")) == (375 * MIB, 125 * MIB)


def test_without_contention_every_target_is_the_cap(host: Host) -> None:
    host.set("b", cap=50 * MIB)
    for name in "ab":
        host.pool(name, limit_bytes=100 * MIB)
    host.tick(30)
    assert (host.target("a"), host.target("b")) == (100 * MIB, 50 * MIB)


FAIR = CONFIG.replace('"static"', '"fair"')


def test_copies_go_before_what_is_nowhere_else(make: MakeHost) -> None:
    host = make(FAIR)
    host.pool("golden", 60, ephemeral=True)
    host.pool("web", 60)
    host.tick()
    for available, golden in ((80, 30), (50, 0)):
        host.memory(available)
        host.tick()
        assert (host.target("web") or 0) >= host.taken("web")
        assert golden * MIB <= (host.target("golden") or 0) <= (golden + 15) * MIB
    host.memory(available=0)
    host.tick()
    assert (host.target("web") or 0) < 20 * MIB, "only what is lacking still"


def test_idle_copies_go_before_anything_that_is_served(make: MakeHost) -> None:
    host = make(FAIR)
    host.pool("golden", 60, served=False, ephemeral=True)
    host.pool("kept", 20, served=False)
    host.pool("web", 60)
    host.tick()
    kept = host.taken("kept")
    host.memory(available=60)
    host.tick()
    assert host.taken("golden") < MIB
    assert host.taken("kept") == kept
    assert (host.target("web") or 0) >= host.taken("web")


def test_how_long_a_source_takes_is_measured(make: MakeHost) -> None:
    """Of two sources that are used alike the copies of the slower one stay."""
    host = make(FAIR)
    for name, microseconds in (("far", 1000), ("near", 50)):
        fd = host.pool(name, 60, ephemeral=True, file_reads=10_000)
        fakes.write_latencies(fd, file_read=fakes.histogram(sum_ns=10_000 * 1000 * microseconds))
        host.use(name, 60, file_reads=10_000)
    heat = tuple(60 * MIB * (age == 5) for age in range(poolfile.GENERATIONS))
    none = (0,) * poolfile.GENERATIONS
    for fd in host.files():
        fakes.write_ages(fd, poolfile.Ages(none, none, none, heat, none, none, 1, 1))
    host.memory(available=60)
    host.tick()
    assert (host.target("far") or 0) >= 60 * MIB


def test_what_a_miss_costs_is_told_and_far_files_keep_their_pages(make: MakeHost) -> None:
    """Of two swap devices that are used alike, and one that nothing is known of."""
    host = make(FAIR)
    for name, microseconds in (("far", 5000), ("near", 50), ("new", 0)):
        fd = host.pool(name, 60, file_reads=10_000 * bool(microseconds))
        fakes.write_latencies(fd, file_read=fakes.histogram(sum_ns=10_000 * 1000 * microseconds))
        host.use(name, 60, file_reads=10_000 * bool(microseconds))
    heat = tuple(60 * MIB * (age == 8) for age in range(poolfile.GENERATIONS))
    none = (0,) * poolfile.GENERATIONS
    for fd in host.files():
        fakes.write_ages(fd, poolfile.Ages(none, none, none, heat, none, none, 1, 1))
    host.memory(available=60)
    host.tick()
    assert (host.target("far") or 0) >= 60 * MIB
    status = operations.status(host.pools, "far")
    assert status
    assert status.miss_seconds == pytest.approx(5e-3)
    told = {
        name: host.governor.measured(msgspec.structs.replace(status, name=name)).miss_seconds
        for name in ("far", "near", "new")
    }
    assert told == {"far": pytest.approx(4.55e-3, rel=0.01), "near": pytest.approx(5.45e-5, rel=0.01), "new": 5e-3}


def test_what_the_host_lacks_is_taken_from_the_pools(host: Host) -> None:
    host.pool("a", 60)
    host.pool("b", 20)
    host.tick()
    taken = host.taken("a") + host.taken("b")
    host.memory(available=60)
    host.tick()
    status = host.governor.status
    assert status.used_bytes == taken
    assert taken - 40 * MIB - 10 * MIB <= status.budget_bytes <= taken - 40 * MIB
    targets = [host.target(name) or 0 for name in "ab"]
    assert sum(targets) == status.targets_bytes <= status.budget_bytes
    host.memory(available=900)
    host.tick(40)
    assert host.target("a") == 250 * MIB


def test_pinned_targets_are_left_alone_and_counted(host: Host) -> None:
    host.pool("a", limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB)
    host.set("a", target=100 * MIB)
    host.tick(40)
    assert (host.target("a"), host.target("b")) == (100 * MIB, 400 * MIB)
    host.set("a", target=None)
    host.tick()
    assert (host.target("a"), host.target("b")) == (250 * MIB, 250 * MIB)


def test_frozen_pools_keep_what_they_take_and_no_more_is_kept_for_them(host: Host) -> None:
    host.pool("a", 64, limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB)
    host.tick(40)
    poolfile.write_frozen(host.pools.kept()[0].fd, True)
    host.tick(40)
    frozen, taken = host.target("a") or 0, host.taken("a")
    assert taken < frozen < taken * 1.2 + 4 * MIB
    assert host.target("b") == 500 * MIB - frozen
    host.memory(available=150)
    host.tick(40)
    assert taken <= (host.target("a") or 0) <= frozen
    host.memory(available=60)
    host.tick()
    assert (host.target("a") or 0) < taken - 35 * MIB, "the host's reserve goes before it"
    host.memory(available=101)
    host.tick()
    assert host.target("a") == taken


def test_a_cap_goes_before_a_frozen_pool_s_use_and_a_pinned_target(host: Host) -> None:
    host.pool("frozen", 60, limit_bytes=GIB)
    host.pool("pinned", 60, limit_bytes=GIB)
    poolfile.write_frozen(host.pools.kept()[0].fd, True)
    host.set("pinned", target=100 * MIB)
    host.tick()
    for name in ("frozen", "pinned"):
        host.set(name, cap=20 * MIB)
    host.tick()
    assert (host.target("frozen"), host.target("pinned")) == (20 * MIB, 20 * MIB)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Host]:
    """A host whose pools have a tmpfs of 80 MiB."""
    with mountable(tmp_path / "pools") as directory, ExitStack() as held:
        mount_tmpfs(directory, str(80 * MIB))
        yield Host(tmp_path, held)


def test_targets_are_no_more_than_the_tmpfs_holds(small: Host) -> None:
    for name in "ab":
        small.pool(name, limit_bytes=GIB)
    small.tick(40)
    assert small.governor.status.budget_bytes == 80 * MIB
    assert (small.target("a"), small.target("b")) == (40 * MIB, 40 * MIB)


def test_a_control_page_that_cannot_be_written_holds_nobody_else_up(
    small: Host, caplog: pytest.LogCaptureFixture
) -> None:
    fd = small.pool("a", limit_bytes=GIB)
    small.pool("b", 40, limit_bytes=GIB)
    small.tick(40)
    where = ["-o", str(poolfile.CONTROL_OFFSET), "-l", str(PAGE), str(small.directory / "a.pool")]
    subprocess.run(["fallocate", "--punch-hole", *where], check=True)
    with open(small.directory / "full", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(PAGE)):
            pass
    small.set("b", cap=20 * MIB)
    small.tick(2)
    assert poolfile.read_control(fd).target is None
    assert small.target("b") == 20 * MIB
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "pool a cannot be told its target: No space left on device"


def test_a_pool_nobody_serves_counts_with_what_it_takes(host: Host) -> None:
    fd = host.pool("a", 100, served=False)
    host.pool("b", limit_bytes=GIB)
    host.tick(40)
    assert host.target("a") is None
    assert host.target("b") == 500 * MIB - host.taken("a")
    assert poolfile.lock(fd)
    host.tick(3)
    assert host.target("a") == 250 * MIB


def test_a_pool_without_a_file_has_room_to_grow(make: MakeHost) -> None:
    host = make(CONFIG.replace('"static"', '"fair"'))
    host.pool("a", 20, has_file=False, limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB, puts=1)
    for tick in range(40):
        host.use("b", 60, limit_bytes=GIB, puts=tick * 100_000, pages_in_file=16384)
        host.tick()
    assert host.target("a") == pytest.approx(250 * MIB, abs=MIB), "its share"


def test_pools_without_a_file_share_by_weight_and_squeeze_nobody(make: MakeHost) -> None:
    host = make(CONFIG.replace('"static"', '"fair"'))
    for name in ("x", "y", "z"):
        host.pool(name, 20, has_file=False, limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB, puts=1)
    for tick in range(40):
        host.use("b", 60, limit_bytes=GIB, puts=tick * 100_000, pages_in_file=16384)
        host.tick()
    assert (host.target("b") or 0) >= 124 * MIB
    assert all(host.target(name) == pytest.approx(125 * MIB, abs=MIB) for name in "xyz")


def test_a_pool_without_a_file_is_lent_nothing_beyond_its_share(make: MakeHost) -> None:
    """It could not give it back."""
    host = make(CONFIG.replace('"static"', '"greedy"'))
    host.pool("a", 100, has_file=False, limit_bytes=GIB, puts=1)
    host.pool("b", limit_bytes=GIB)
    for tick in range(40):
        host.use("a", 100, limit_bytes=GIB, puts=tick * 100_000)
        host.tick()
    assert host.target("a") == pytest.approx(250 * MIB, abs=MIB)
    host.set("b", weight=900)
    host.tick(40)
    assert host.target("a") == pytest.approx(host.taken("a"), abs=MIB), "nor less than it takes"


@needs_root
def test_what_takes_ram_and_is_served_by_nobody_is_at_its_owner_s_expense(make: MakeHost) -> None:
    host = make()
    for name, owner, taken, served in (("idle", 1, 64, False), ("own", 1, 0, True), ("other", 2, 0, True)):
        os.fchown(host.pool(name, taken, served=served, limit_bytes=GIB), owner, owner)
    path = host.directory / "idle.pool"
    subprocess.run(["fallocate", "--offset", str(GIB), "--length", "236M", str(path)], check=True)
    host.tick(40)
    idle = host.taken("idle")
    assert host.target("own") == pytest.approx(500 * MIB * 2 // 3 - idle, abs=MIB)
    assert host.target("other") == pytest.approx(500 * MIB // 3, abs=MIB)
    with pytest.raises(PoolError, match="user 1 has pools that nobody serves and that take 300M of RAM"):
        host.governor.admit(1)
    host.governor.admit(2)
    path.unlink()
    host.pools.adopt_all()
    host.tick()
    host.governor.admit(1)


def test_an_unfinished_pool_that_is_filled_is_cut_back(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.pool("b", limit_bytes=GIB)
    host.pools.create("new", os.geteuid(), os.getegid())
    host.pools.adopt_all()
    path = host.directory / "new.pool"
    for _ in range(3):
        subprocess.run(["fallocate", "--length", "300M", str(path)], check=True)
        host.tick()
        assert path.stat().st_blocks * 512 <= 4 * PAGE
    host.tick(40)
    assert (host.target("b") or 0) >= 499 * MIB
    with host.pools.pool("new", control=True) as pool:
        poolfile.write_target(pool.fd, 5)
        assert poolfile.read_control(pool.fd).target == 5
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == f"pool new is unfinished, and user {os.geteuid()} has filled its file with 300M: it is cut back"


def test_a_pool_that_cannot_be_opened_counts_with_what_it_takes(host: Host) -> None:
    host.pool("b", limit_bytes=GIB)
    with fakes.pool(host.directory, "held") as fd:
        os.posix_fallocate(fd, 0, 100 * MIB)
        with fakes.leased(fd):
            assert host.pools.adopt_all() == {"held"}
            host.tick(40)
            assert host.governor.status.used_bytes >= 100 * MIB
            assert host.target("b") == pytest.approx(400 * MIB, abs=MIB)
            (held,) = (status for status in operations.statuses(host.pools) if status.name == "held")
            assert (held.taken_bytes, held.counters.used_bytes) == (os.fstat(fd).st_blocks * 512,) * 2
            assert "its owner holds a lease on it" in (held.error or "")
        assert host.pools.adopt_all() == set()


def test_a_full_tmpfs_refuses_a_pool_and_keeps_nothing_of_it(small: Host) -> None:
    with open(small.directory / "full", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(PAGE)):
            pass
    with pytest.raises(PoolError, match=r"cannot create .*/new.pool for user \d+: No space left on device"):
        small.pools.create("new", os.geteuid(), os.getegid())
    assert [path.name for path in small.directory.iterdir()] == ["full"]


def test_what_guests_did_lately_is_remembered(make: MakeHost) -> None:
    host = make(CONFIG.replace('"static"', '"fair"').replace("50%", "64M"))
    none = (0,) * poolfile.GENERATIONS
    old = tuple(40 * MIB * (age == 5) for age in range(poolfile.GENERATIONS))
    fds = {name: host.pool(name, 40, limit_bytes=GIB) for name in ("dull", "read")}
    for tick in range(20):
        for name, fd in fds.items():
            read = tuple(tick * 1000 * (age == 5 and name == "read") for age in range(poolfile.GENERATIONS))
            fakes.write_ages(fd, poolfile.Ages(read, none, none, old, none, none, tick, 1))
        host.tick()
    assert (host.target("read") or 0) > (host.target("dull") or 0) + 5 * MIB


def test_raises_wait_for_what_others_have_to_give_back_first() -> None:
    def pool(name: str, target: int, minimum: int = 0) -> Demand:
        values = dict.fromkeys(Demand.__struct_fields__, 0) | {
            "name": name, "has_file": True, "target": target, "minimum": minimum, "heat": (),
        }  # fmt: skip
        return Demand(**values)  # type: ignore[arg-type]

    demands = [pool("giver", 100), pool("a", 10), pool("b", 20), pool("c", 10, minimum=30), pool("d", 10)]
    targets = {"giver": 40, "a": 40, "b": 50, "c": 30, "d": 10}
    assert limit_raises(demands, targets, 0) == targets
    assert limit_raises(demands, targets, 30) == targets | {"a": 25, "b": 35}
    assert limit_raises(demands, targets, 1000) == targets | {"a": 10, "b": 20}


def test_a_pool_that_owes_holds_others_back(host: Host) -> None:
    host.pool("a", 100, limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB)
    host.set("b", weight=1)
    host.tick(40)
    before = host.target("b") or 0
    host.set("a", weight=1)
    host.set("b", weight=10_000)
    host.tick(10)
    owed = host.taken("a") - (host.target("a") or 0)
    assert owed > 50 * MIB
    assert before < (host.target("b") or 0) <= 500 * MIB - host.taken("a")


LIES = {
    "uses more than its file takes": {"used_bytes": 1 << 50, "puts": 1 << 40},
    "cannot do with less": {"minimum_bytes": 1 << 60, "limit_bytes": 1 << 60},
    "no limit at all": {"limit_bytes": (1 << 64) - 1},
    "a limit of nothing": {"limit_bytes": 0},
    "pages beyond its device": {"pages_in_tmem": 1 << 63, "pages_in_file": 1 << 63},
    "an index larger than all": {"index_bytes": 1 << 63},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("policy", ["fair", "greedy", "static", "reconf-static", "smart-alloc:2"])
def test_a_plugin_that_lies_takes_nobody_s_share(make: MakeHost, policy: str, lie: str) -> None:
    host = make(CONFIG.replace("static", policy))
    host.pool("honest", limit_bytes=240 * MIB, puts=1000, used_bytes=0)
    values: dict[str, Any] = {"limit_bytes": 240 * MIB, "puts": 1000} | LIES[lie]
    host.pool("liar", **values)
    host.tick(40)
    status = host.governor.status
    assert status.targets_bytes <= status.budget_bytes == 500 * MIB
    assert status.used_bytes < 10 * MIB
    for sample in host.governor.samples:
        counters = sample.counters
        assert counters.index_bytes <= counters.used_bytes <= host.taken(sample.name)
        assert counters.minimum_bytes <= min(counters.limit_bytes, host.taken(sample.name) + MIB)
        assert max(counters.limit_bytes >> 62, counters.pages_in_tmem >> 62, counters.pages_in_file >> 62) <= 1
    if policy in {"fair", "static", "reconf-static"}:  # the others know no weights
        assert (host.target("honest") or 0) >= 230 * MIB


def test_counters_that_run_backwards_are_a_new_beginning(host: Host) -> None:
    host.pool("a", puts=1 << 40, gets=1 << 40, demotion_writes=1 << 40)
    observer = Observer(host.of)
    observer.look(host.pools.kept())
    host.use("a", 0, puts=5, gets=5)
    assert observer.look(host.pools.kept())["a"].before is None
    host.use("a", 0, puts=6, gets=5)
    assert observer.look(host.pools.kept())["a"].before is not None


def test_damaged_pools_count_with_what_they_take(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    fd = host.pool("broken", 30)
    cut = host.pool("cut", 30)
    host.pool("whole", limit_bytes=GIB)
    os.pwrite(fd, b"x" * 100, 100)
    os.ftruncate(cut, 5000)
    host.tick(40)
    assert host.target("whole") == 500 * MIB - host.taken("broken") - host.taken("cut")
    assert [record.getMessage().split()[1] for record in caplog.records] == ["broken", "cut"]


def test_ages_that_cannot_be_are_ignored(host: Host) -> None:
    fd = host.pool("a")
    os.pwrite(fd, b"\xff" * 4096, poolfile.STATISTICS_OFFSET)
    host.tick()
    (sample,) = host.governor.samples
    assert sample.ages.published == 0


def test_unchanged_targets_are_not_written(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        host.pool(name)
    host.tick(40)
    monkeypatch.setattr(poolfile, "write_target", None)
    host.tick(10)


def test_a_governor_that_comes_back_changes_nothing_at_once(host: Host) -> None:
    for name in "ab":
        host.pool(name, 20, limit_bytes=GIB)
    host.memory(available=300)
    host.tick(40)
    before = [host.target(name) for name in "ab"]
    host.start()
    host.tick()
    assert [host.target(name) for name in "ab"] == before
    host.memory(available=1000)
    host.start()
    host.tick()
    after = [host.target(name) or 0 for name in "ab"]
    assert sum(after) - sum(each or 0 for each in before) <= 500 * MIB / 16


def test_pressure_takes_memory_back_where_little_is_available(host: Host) -> None:
    host.pool("a", 100)
    host.tick(40)
    for _ in range(40):
        host.memory(available=800, free=20, stalled=0.3)
        host.tick()
    assert host.governor.status.pressure_some == pytest.approx(0.6)
    assert host.governor.status.pressure_full == pytest.approx(0.3)
    assert host.target("a") == 256 * MIB, "whoever waits has a limit of his own: only the page cache is large"
    host.memory(available=110, free=20, stalled=0.3)
    host.tick()
    assert host.taken("a") - 40 * MIB <= (host.target("a") or 0) < host.taken("a")


def test_the_pressure_of_others_does_not_count_where_a_cgroup_of_our_own_binds(host: Host) -> None:
    host.pool("a", 40)
    box: dict[str, object] = {
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/memory.max": 100 * MIB,
        "sys/fs/cgroup/box/memory.current": 87 * MIB,
        "sys/fs/cgroup/box/memory.pressure": "some avg10=0 total=0\nfull avg10=0 total=0",
    }
    tree(host.root, {"proc/meminfo": (host.root / "proc/meminfo").read_text()} | box)
    host.start()
    host.tick(10)
    before = host.governor.status.budget_bytes
    host.memory(available=1000, stalled=0.5)
    host.tick()
    assert host.governor.status.budget_bytes == before
    tree(host.root, {"sys/fs/cgroup/box/memory.pressure": "some avg10=0 total=400000\nfull avg10=0 total=0"})
    host.memory(available=1000)
    host.tick()
    assert host.governor.status.budget_bytes < before


def test_a_cgroup_s_limit_binds_with_its_share_of_the_reserve(host: Host) -> None:
    host.pool("a", 50)
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/memory.max": 100 * MIB,
        "sys/fs/cgroup/box/memory.current": 60 * MIB,
    }
    tree(host.root, {"proc/meminfo": (host.root / "proc/meminfo").read_text()} | files)
    host.start()
    host.tick()
    status = host.governor.status
    assert (status.total_bytes, status.available_bytes) == (100 * MIB, 40 * MIB)
    assert status.reserve_bytes == 10 * MIB
    assert status.budget_bytes == 50 * MIB


WRITES = CONFIG + "[demotion]\nwrites_per_hour = '1G'\n"
SAVED = GIB // 4 // PAGE


def test_demotion_s_writes_are_shared_out(make: MakeHost) -> None:
    host = make(WRITES)
    a, b = host.pool("a", demotion_writes=70), host.pool("b")
    golden = host.pool("golden", ephemeral=True)
    host.tick()
    assert poolfile.read_control(golden).demotion_writes is None
    assert poolfile.read_control(a).demotion_writes == 70 + SAVED // 2
    assert poolfile.read_control(b).demotion_writes == SAVED // 2
    host.use("a", 0, demotion_writes=70 + 1000)
    host.tick()
    left = host.governor.status.writes_left_bytes
    assert left is not None
    assert (SAVED - 1000) * PAGE <= left <= (SAVED - 980) * PAGE
    host.start(WRITES)
    host.tick()
    assert host.governor.status.writes_left_bytes == pytest.approx(left, rel=0.02), "forgotten by a restart"
    host.start()
    host.tick()
    assert poolfile.read_control(a).demotion_writes is None
    assert host.governor.status.writes_left_bytes is None


def test_below_the_reserve_demotion_writes_all_it_likes(make: MakeHost) -> None:
    host = make(WRITES)
    fd = host.pool("a", 50)
    host.tick()
    host.memory(available=99)
    host.tick()
    assert poolfile.read_control(fd).demotion_writes is None
    host.memory(available=101)
    host.tick()
    assert poolfile.read_control(fd).demotion_writes == pytest.approx(SAVED, rel=0.01)


def test_who_attaches_between_two_ticks_keeps_to_the_budget(host: Host) -> None:
    host.pool("a", 10, limit_bytes=GIB)
    host.set("a", target=300 * MIB)
    host.tick(40)

    def first(name: str, wanted: int, *, has_file: bool = True) -> int:
        return host.governor.first_target(Attach(name, 64 * MIB, has_file), wanted)

    assert first("b", 150 * MIB) == 150 * MIB
    assert first("c", 150 * MIB) == 50 * MIB
    assert first("d", 150 * MIB) == 0
    assert first("ram", GIB, has_file=False) == 250 * MIB, "what it refuses are I/O errors: its share"
    host.set("e", minimum=20 * MIB)
    assert first("e", 150 * MIB) == 20 * MIB
    host.tick()
    assert first("d", 150 * MIB) == 150 * MIB
    assert first("a", GIB) >= host.taken("a")


def test_a_policy_that_is_none_is_an_error(host: Host) -> None:
    with pytest.raises(ValueError, match="is no policy"):
        host.governor.configure(DaemonConfig(policy="nice"))


def changes(caplog: pytest.LogCaptureFixture) -> str:
    """What was logged since the last call."""
    lines = caplog.messages
    caplog.clear()
    return "\n".join(lines)


def test_the_log_says_why_each_target_changed(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tmemd")
    host.pool("a", 60, limit_bytes=GIB)
    host.pool("b", 60, limit_bytes=GIB)
    host.set("b", cap=300 * MIB)
    host.tick()
    assert changes(caplog) == "budget 500M, targets a 1.00G -> 250M (budget), b 1.00G -> 250M (budget)"
    host.tick()
    assert changes(caplog) == "", "what stays needs no reason"
    host.set("a", target=200 * MIB)
    host.tick()
    assert changes(caplog) == "budget 500M, targets a 250M -> 200M (pinned), b 250M -> 300M (cap)"
    host.set("a", target=None, minimum=350 * MIB)
    host.tick()
    assert changes(caplog) == "budget 500M, targets a 200M -> 350M (minimum), b 300M -> 150M (demand)"
    poolfile.write_frozen(host.pools.kept()[1].fd, True)
    host.tick()
    assert "b 150M -> 71.5M (frozen)" in changes(caplog)


def test_the_log_says_what_changed_the_budget(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tmemd")
    host.pool("a", 60, limit_bytes=GIB)
    host.tick()
    changes(caplog)
    host.memory(available=80)
    host.tick()
    assert changes(caplog).endswith("(reserve)")
    host.memory(available=900)
    host.tick(4)
    assert changes(caplog).endswith("(budget)")
    host.tick(40)
    changes(caplog)
    host.memory(available=110, stalled=0.2)
    host.tick()
    assert changes(caplog).endswith("(pressure)")


def test_the_log_says_that_a_raise_waits_for_others(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tmemd")
    host.pool("a", 100, limit_bytes=GIB)
    host.pool("b", limit_bytes=GIB)
    host.pool("c", has_file=False, limit_bytes=GIB)
    host.set("b", weight=1)
    host.tick(40)
    changes(caplog)
    host.set("a", weight=1)
    host.set("b", weight=10_000)
    host.tick()
    owed = "owed: 494M once others have given memory back"
    assert changes(caplog) == (
        f"budget 500M, targets a 249M -> 1.00M (minimum), b 2.49M -> 395M ({owed}), c 249M -> 4.95M (without file)"
    )


def test_nothing_is_explained_where_nobody_reads_it(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "tmemd")
    monkeypatch.setattr(governor, "explain", None)
    host.pool("a", limit_bytes=GIB)
    host.tick()
    assert host.target("a") == 500 * MIB
    assert changes(caplog) == ""
