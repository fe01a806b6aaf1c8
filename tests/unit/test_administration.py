# SPDX-License-Identifier: BSD-3-Clause
"""What tmemd does for those who ask, without the socket between: what is refused, what is kept, whenever it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.support import fakes
from tmemd import protocol
from tmemd.client import Client
from tmemd.daemon.access import Access
from tmemd.daemon.administration import Administration
from tmemd.daemon.maintenance import Maintenance
from tmemd.daemon.server import Server, listen
from tmemd.daemon.start import run
from tmemd.daemonconfig import parse_config
from tmemd.governor.governor import Governor
from tmemd.protocol import Destroy, Freeze, Set
from tmemd.settings import Overrides, PoolSettings, SettingsStore
from tmemd.store import poolfile
from tmemd.store.directory import Pools
from tmemd.store.poolfile import PoolError

MIB = fakes.MIB
TOTAL = 1024 * MIB
A, B = 65533, 65534  # users
PATIENCE = 20.0  # seconds for what takes none

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have pools of other users")


@pytest.fixture
def base() -> Iterator[Path]:
    with fakes.on_tmpfs() as path:
        (path / "pools").mkdir()
        yield path


@contextmanager
def administration(base: Path, config: str = "", *, total: int = TOTAL) -> Iterator[Administration]:
    """As tmemd has it after its start."""
    with ExitStack() as opened:
        pools = Pools(base / "pools", keep=True)
        opened.callback(pools.close)
        store = SettingsStore(base / "state")
        opened.callback(store.close)
        made = Administration(pools, store, parse_config(config), total)
        made.name_owners()
        made.adopt()
        yield made


def attach(made: Administration, name: str, size: int = 64 * MIB, *, ephemeral: bool = False, **values: int) -> None:
    """What happens when a plugin comes."""
    request = protocol.Attach(name, size, True, values.get("limit_bytes", fakes.LIMIT))
    with made.attach(request, os.geteuid(), os.getegid(), bounded=False) as found:
        if found.identity() is None:
            fakes.finish_pool(found.fd, name, size, has_file=True, ephemeral=ephemeral, **values)


def page(base: Path, name: str = "web") -> tuple[int | None, bool, bool]:
    """Target, frozen and compression as a plugin sees them."""
    with open(base / f"pools/{name}.pool", "rb") as file:
        fd = file.fileno()
        return poolfile.read_control(fd).target, poolfile.read_control(fd).frozen, poolfile.read_control(fd).compression


def perform(made: Administration, request: protocol.Request) -> protocol.Answer:
    """As tmemd does it, when nobody else asks."""
    return asyncio.run(made.perform(request))


def status(made: Administration, name: str = "web") -> protocol.PoolStatus:
    answer = perform(made, protocol.Show(name))
    assert isinstance(answer, protocol.Listed)
    return answer.pools[0]


def test_settings_are_in_the_status_and_in_the_control_page(base: Path) -> None:
    with administration(base, '[pools.web]\nweight = 7\ncap = "100M"') as made:
        attach(made, "web")
        assert status(made).settings == PoolSettings(weight=7, cap=100 * MIB)
        assert page(base)[0] == 100 * MIB
        perform(made, Set(name="web", cap=90 * MIB))
        assert page(base)[0] == 90 * MIB, "a cap holds at once"
        perform(made, Set(name="web", cap=100 * MIB))
        perform(made, Set(name="web", weight=8, minimum=MIB, compression=False, target=50 * MIB))
        perform(made, Freeze("web", True))
        assert status(made).settings == PoolSettings(8, 100 * MIB, MIB, 50 * MIB, False, True)
        assert page(base) == (50 * MIB, True, False)
        flat = status(made).flat()
        assert (flat["weight"], flat["cap"], flat["minimum"], flat["target"]) == (8, 100 * MIB, MIB, 50 * MIB)
        perform(made, Set(name="web", cap=None, target=None, compression=True))
        perform(made, Freeze("web", False))
        assert status(made).settings == PoolSettings(8, None, MIB)
        assert page(base) == (50 * MIB, False, True), "what a policy will change stays until it does"


def test_a_pool_that_is_new_after_a_reboot_has_its_old_settings(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        perform(made, Set(name="web", weight=8, compression=False, target=50 * MIB))
        perform(made, Freeze("web", True))
    (base / "pools/web.pool").unlink()
    with administration(base) as made:
        attach(made, "web")
        assert page(base) == (50 * MIB, True, False)
        assert status(made).settings == PoolSettings(8, None, 0, 50 * MIB, False, True)


def test_a_pool_that_is_adopted_gets_what_is_kept(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        perform(made, Freeze("web", True))
        perform(made, Set(name="web", target=50 * MIB, compression=False))
    with open(base / "pools/web.pool", "r+b") as file:
        poolfile.write_frozen(file.fileno(), False)
        poolfile.write_target(file.fileno(), 7 * MIB)
        poolfile.write_compression(file.fileno(), True)
    with administration(base):
        assert page(base) == (50 * MIB, True, False)


def test_a_cap_that_came_later_goes_before_a_pinned_target(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        perform(made, Set(name="web", target=50 * MIB))
    with administration(base, '[pools.web]\ncap = "20M"') as made:
        assert page(base)[0] == 20 * MIB
        perform(made, Set(name="web", weight=7))
        with made.attach(protocol.Attach("web", 64 * MIB, True), os.geteuid(), os.getegid(), bounded=False):
            assert page(base)[0] == 20 * MIB


def test_a_target_that_a_plugin_comes_back_to_is_within_the_cap(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        with made.pools.pool("web", control=True) as found:
            poolfile.write_target(found.fd, 50 * MIB)
    with administration(base, '[pools.web]\ncap = "20M"') as made:
        attach(made, "web")
        assert page(base)[0] == 20 * MIB


def test_a_pool_frozen_without_tmemd_stays_frozen_until_somebody_thaws_it(base: Path) -> None:
    with fakes.pool(base / "pools", "web") as fd:
        poolfile.write_frozen(fd, True)
    with administration(base) as made:
        assert status(made).settings.frozen
        assert page(base)[1]
        perform(made, Freeze("web", False))
        assert not status(made).settings.frozen
        assert not page(base)[1]


def test_another_configuration_holds_for_what_was_not_set(base: Path) -> None:
    with administration(base, "[pools.web]\nweight = 7\ncompression = false") as made:
        attach(made, "web")
        assert not page(base)[2]
        perform(made, Set(name="web", weight=8))
        made.configure(parse_config('[pools.web]\nweight = 9\nminimum = "3M"'))
        made.adopt()
        assert status(made).settings == PoolSettings(weight=8, minimum=3 * MIB)
        assert page(base)[2]


def test_all_are_frozen_those_that_come_back_later_too(base: Path) -> None:
    with administration(base) as made:
        for name in ("a", "b", "gone"):
            attach(made, name)
        perform(made, Set(name="gone", weight=5))
        (base / "pools/gone.pool").unlink()
        perform(made, Freeze(None, True))
        assert [page(base, name)[1] for name in ("a", "b")] == [True, True]
        attach(made, "gone")
        assert page(base, "gone")[1]
        perform(made, Freeze(None, False))
        assert [page(base, name)[1] for name in ("a", "b", "gone")] == [False] * 3


def test_pools_that_could_not_be_frozen_are_named(base: Path) -> None:
    with fakes.pool(base / "pools", "other") as other, fakes.leased(other), administration(base) as made:
        attach(made, "web")
        with pytest.raises(PoolError, match="all pools were frozen but other"):
            perform(made, Freeze(None, True))
        assert page(base)[1]


def test_destroy_forgets_settings_of_pools_that_are_gone_too(base: Path) -> None:
    with administration(base) as made:
        for name in ("web", "gone"):
            attach(made, name)
            perform(made, Set(name=name, weight=5))
        (base / "pools/gone.pool").unlink()
        for name in ("web", "gone"):
            perform(made, Destroy(name))
            assert made.settings(name) == PoolSettings()
            with pytest.raises(PoolError, match="there is no pool"):
                perform(made, Destroy(name))


def test_destroy_that_is_refused_forgets_nothing(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web", pages_in_tmem=3)
        perform(made, Set(name="web", weight=5))
        with pytest.raises(PoolError, match="3 pages"):
            perform(made, Destroy("web"))
        assert made.settings("web").weight == 5


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Set(name="web", weight=5, cap=MIB - 1), r"a cap of 1048575 bytes \(1.00M\) is below its least, 1048576 bytes"),
        (Set(name="web", weight=5, minimum=257 * MIB), "a minimum of .* is above its limit, 268435456 bytes"),
        (Set(name="web", weight=5, cap=5 * MIB, minimum=6 * MIB), "a minimum of 6.00M is above its cap, 5.00M"),
        (Set(name="web", weight=5, target=5 * MIB, minimum=6 * MIB), "a minimum of 6.00M is above its target, 5.00M"),
        (Set(name="web", weight=5, target=7 * MIB, cap=6 * MIB), "a target of 7.00M is above its cap, 6.00M"),
        (Set(name="web", weight=5, target=257 * MIB), "a target of .* is outside"),
        (Set(name="web", weight=5, target=0), "a target of 0 bytes .* is outside"),
        (Set(name="web", weight=5, minimum=150 * MIB), "would be 250M in all, and the host gives at most 200M"),
        (Set(name="web", weight=5, target=150 * MIB), "would be 250M in all, and the host gives at most 200M"),
        (Set(name="ram", weight=5, cap=9 * MIB), "a cap of .* is below its use, .*, and it has no backing file"),
        (Set(name="ram", weight=5, target=9 * MIB), "a target of .* is below its use, .*, and it has no backing file"),
        (Set(name="none", weight=5), "there is no pool none"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_changes_nothing(base: Path, wrong: Set, error: str) -> None:
    with administration(base, '[budget]\nmaximum = "200M"') as made:
        attach(made, "web")
        attach(made, "other")
        perform(made, Set(name="other", minimum=100 * MIB))
        with fakes.pool(base / "pools", "ram", has_file=False, used_bytes=10 * MIB):
            before = (base / "state").read_bytes(), page(base)
            with pytest.raises(PoolError, match=error):
                perform(made, wrong)
            assert ((base / "state").read_bytes(), page(base)) == before
            assert made.settings("web") == PoolSettings()


def test_a_promise_of_a_pool_that_is_away_binds_until_it_is_destroyed(base: Path) -> None:
    with administration(base, '[budget]\nmaximum = "200M"\n[pools.never]\nminimum = "10M"') as made:
        attach(made, "web")
        attach(made, "other")
        perform(made, Set(name="other", minimum=150 * MIB))
        (base / "pools/other.pool").unlink()
    with administration(base, '[budget]\nmaximum = "200M"\n[pools.never]\nminimum = "10M"') as made:
        with pytest.raises(
            PoolError, match=r"would be 310M in all, .* pools that are away count, never, other: destroy"
        ):
            perform(made, Set(name="web", minimum=150 * MIB))
        perform(made, Destroy("other"))
        perform(made, Set(name="web", minimum=150 * MIB))


def test_promises_that_do_not_fit_any_more_are_kept_in_part_and_said(base: Path) -> None:
    with administration(base, '[budget]\nmaximum = "800M"') as made:
        attach(made, "web")
        attach(made, "db")
        perform(made, Set(name="web", minimum=200 * MIB))
        perform(made, Set(name="db", target=200 * MIB))
        assert made.problems.all() == []
    with administration(base, '[budget]\nmaximum = "200M"') as made:
        (problem,) = made.problems.all()
        assert (problem.what, problem.words.partition(" (")[0]) == (
            "promises", "minimums and fixed targets are 400M in all, and the host gives at most 200M",
        )  # fmt: skip
        assert made.granted("web").minimum == 100 * MIB
        assert page(base, "db")[0] == 100 * MIB
        assert made.settings("web").minimum == 200 * MIB, "what was set is kept"
        perform(made, Set(name="web", minimum=0))
        assert made.problems.all() == []
        assert page(base, "db")[0] == 100 * MIB
        made.adopt()
        assert page(base, "db")[0] == 200 * MIB


def test_what_is_set_while_the_disk_is_full_holds_at_once_and_whoever_sets_it_is_told(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        attach(made, "gone")
        perform(made, Set(name="gone", weight=5))
        (base / "state.new").mkdir()  # as well as a full disk: nothing can be written there
        (base / "pools/gone.pool").touch()
        notes = set()
        for request in (Set(name="web", target=50 * MIB), Freeze("web", True), Destroy("gone", True)):
            answer = perform(made, request)
            assert isinstance(answer, protocol.Done)
            notes.add(answer.note)
        assert page(base) == (50 * MIB, True, True)
        assert not (base / "pools/gone.pool").exists()
        (problem,) = made.problems.all()
        assert notes == {problem.words}
        assert problem.words.startswith(f"cannot keep settings in {base}/state: Is a directory")
        (base / "state.new").rmdir()
        asyncio.run(made.retry())
        assert made.problems.all() == []
        assert perform(made, Freeze("web", True)) == protocol.Done()
    with administration(base) as made:
        assert status(made).settings == PoolSettings(target=50 * MIB, frozen=True)
        assert made.settings("gone") == PoolSettings()


def test_damaged_settings_are_read_again_when_they_are_mended(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        perform(made, Set(name="web", weight=7, minimum=MIB))
    whole = (base / "state").read_bytes()
    (base / "state").write_bytes(whole[:-9])
    with administration(base) as made:
        assert [problem.what for problem in made.problems.all()] == ["settings"]
        assert status(made).settings == PoolSettings()
        perform(made, Set(name="web", weight=8))
        assert (base / "state").read_bytes() == whole[:-9]
        (base / "state").write_bytes(whole)
        asyncio.run(made.retry())
        assert made.problems.all() == []
        assert status(made).settings == PoolSettings(weight=8, minimum=MIB)


def test_what_became_impossible_does_not_stop_other_changes(base: Path) -> None:
    with administration(base) as made:
        attach(made, "web")
        perform(made, Set(name="web", minimum=150 * MIB))
        made.configure(parse_config('[budget]\nmaximum = "1M"\n[pools.web]\ncap = "2M"'))
        perform(made, Set(name="web", weight=5))
        perform(made, Set(name="web", minimum=MIB))
        assert made.settings("web") == PoolSettings(weight=5, minimum=MIB, cap=2 * MIB)


def test_users_have_a_bounded_number_of_pools(base: Path) -> None:
    def come(made: Administration, name: str, uid: int, *, bounded: bool = True) -> None:
        with made.attach(protocol.Attach(name, MIB, True), uid, os.getegid(), bounded=bounded):
            pass

    uid = os.geteuid()
    with administration(base, "pools_per_user = 2") as made:
        for name in ("a", "b", "a"):
            come(made, name, uid)
        with pytest.raises(PoolError, match=rf"user {uid} has 2 pools, and may not have more \(pools_per_user\)"):
            come(made, "c", uid)
        assert sorted(path.name for path in (base / "pools").iterdir()) == ["a.pool", "b.pool"]
        come(made, "c", uid, bounded=False)
        if uid == 0:
            come(made, "d", 12345)


# A process that dies at any line that tmemd executes for a request.

CHANGES: list[protocol.Request] = [
    Set(name="web", weight=9, cap=200 * MIB, minimum=2 * MIB, compression=False, target=50 * MIB),
    Freeze(None, True),
    Destroy("web", True),
]


class Death:
    """Kills this process before the next line of tmemd's own code when files below *base* have changed so many times.

    Whoever dies at a line between two changes leaves the same.
    """

    def __init__(self, base: Path, changes: int) -> None:
        self._base = base
        self._left = changes
        self._files = self._read()

    def _read(self) -> dict[Path, tuple[int, bytes]]:
        """Each file, and the beginning of its content, with all of a pool that tmemd writes."""
        paths = (path for path in self._base.rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.open("rb").read(poolfile.STATES_OFFSET)) for path in paths}

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if "/tmemd/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            before, self._files = self._files, self._read()
            self._left -= self._files != before
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._trace

    def __enter__(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)


def prepare(base: Path) -> Path:
    """A new place with one pool, and settings of two."""
    (base / "pools").mkdir(parents=True)
    with fakes.pool(base / "pools", "web"):
        pass
    store = SettingsStore(base / "state")
    store.change({"web": Overrides(weight=5, minimum=MIB, target=20 * MIB), "gone": Overrides(weight=3)})
    store.close()
    return base


def survived(base: Path, request: protocol.Request, changes: int) -> bool:
    """Whether a tmemd of its own process, killed after so many changes, has carried out the request before."""
    child = os.fork()
    if not child:
        # Nothing of pytest's may run here.
        try:
            with administration(base) as made, Death(base, changes):
                perform(made, request)
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.parametrize("request_", CHANGES, ids=lambda request: type(request).__name__)
def test_sigkill_at_any_line_leaves_the_old_settings_or_the_new_ones(base: Path, request_: protocol.Request) -> None:
    seen = set()
    done, changes = False, 0
    while not done:
        place = prepare(base / str(changes))
        done = survived(place, request_, changes)
        changes += 1
        with administration(place) as made:
            if (place / "pools/web.pool").exists():
                now = made.settings("web")
                assert page(place) == (now.target or page(place)[0], now.frozen, now.compression)
            last = repr([made.settings(name) for name in ("web", "gone")])
            seen.add(last)
            assert made.settings("gone").weight == 3
    assert changes > 4
    assert len(seen) == 2
    assert last != repr([PoolSettings(5, None, MIB, 20 * MIB), PoolSettings(3)])


# Two users of one machine. Only root can act for both.


def come(made: Administration, name: str, uid: int) -> None:
    """What happens when that user's plugin comes."""
    with made.attach(protocol.Attach(name, 64 * MIB, True), uid, os.getegid(), bounded=False) as found:
        if found.identity() is None:
            fakes.finish_pool(found.fd, name)


@needs_root
def test_what_was_set_for_a_pool_is_not_for_another_users_of_that_name(base: Path) -> None:
    with administration(base, "[pools.web]\nminimum = '3M'") as made:
        come(made, "web", A)
        perform(made, Set(name="web", weight=400, cap=90 * MIB, compression=False, target=50 * MIB))
        perform(made, Freeze("web", True))
    (base / "pools/web.pool").unlink()
    with administration(base, "[pools.web]\nminimum = '3M'") as made:
        come(made, "web", B)
        assert status(made).settings == PoolSettings(minimum=3 * MIB), "what root wrote is for whoever has it"
        assert page(base) == (64 * MIB, False, True)
        (base / "pools/web.pool").unlink()
        come(made, "web", A)
        assert status(made).settings.weight == 400
        assert page(base) == (50 * MIB, True, False)
        (base / "pools/web.pool").unlink()
        come(made, "web", B)
        assert status(made).settings.weight == 100, "while tmemd runs, too"
        perform(made, Set(name="web", weight=7))
        (base / "pools/web.pool").unlink()
        come(made, "web", A)
        assert status(made).settings == PoolSettings(minimum=3 * MIB), "one name has one owner's settings"
        perform(made, Set(name="web", weight=8))
        (base / "pools/web.pool").unlink()
        with fakes.pool(base / "pools", "web") as fd:
            os.fchown(fd, B, -1)
            made.adopt()
            assert made.settings("web").weight == 100, "of a pool that came without asking"


@needs_root
def test_freezing_all_leaves_what_is_kept_for_another_user(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with administration(base) as made:
        come(made, "web", A)
        perform(made, Set(name="web", weight=400))
        (base / "pools/web.pool").unlink()
        come(made, "web", B)
        assert caplog.messages == [
            f"pool web belongs to user {B}: what was set for user {A}'s pool of that name does not hold"
        ]
        for frozen in True, False:
            perform(made, Freeze(None, frozen))
            assert page(base)[1] == frozen
        (base / "pools/web.pool").unlink()
        come(made, "web", A)
        assert status(made).settings.weight == 400


@needs_root
def test_settings_kept_without_an_owner_get_that_of_the_pool(base: Path) -> None:
    (base / "state").write_text('{"version": 1, "pools": {"web": {"weight": 400}, "gone": {"weight": 300}}}')
    with fakes.pool(base / "pools", "web") as fd:
        os.fchown(fd, A, -1)
        with administration(base) as made:
            made.name_owners()
            assert (made.settings("web").weight, made.settings("gone").weight) == (400, 300)
    (base / "pools/web.pool").unlink()
    with administration(base) as made:
        come(made, "web", B)
        come(made, "gone", B)
        assert (made.settings("web").weight, made.settings("gone").weight) == (100, 300)


# A disk that is slow.


class SlowStore(SettingsStore):
    """One whose disk takes as long as it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def change(self, changes: Mapping[str, Overrides]) -> None:
        self.entered.set()
        if not self.go_on.wait(PATIENCE):
            raise AssertionError("all of tmemd waited for the disk")
        super().change(changes)


@dataclass
class Running:
    """A tmemd in this process."""

    administration: Administration
    store: SlowStore
    governor: Governor
    socket: Path


async def meanwhile(running: Running) -> None:
    """Two clients change something while the disk does not answer, and others are served."""
    client, store, governor = Client.of_daemon(running.socket), running.store, running.governor
    setting = asyncio.create_task(asyncio.to_thread(client.set, "web", weight=9))
    assert await asyncio.to_thread(store.entered.wait, PATIENCE)
    later = asyncio.create_task(asyncio.to_thread(client.set, "web", weight=10))
    (pool,) = await asyncio.to_thread(client.pools)
    assert pool.settings.weight == 100, "what is not on disk does not hold"
    before = governor.status
    while governor.status is before:
        await asyncio.sleep(0.01)
    assert not setting.done()
    assert not later.done()
    store.go_on.set()
    await asyncio.gather(setting, later)
    assert (await asyncio.to_thread(client.pool, "web")).settings.weight == 10


def during(base: Path, use: Callable[[Running], Awaitable[None]]) -> None:
    """Run a tmemd with the pool 'web' while *use* goes on."""

    async def running_tmemd(
        server: Server, maintenance: Maintenance, listener: socket.socket, running: Running
    ) -> None:
        serving = asyncio.create_task(run(server, maintenance, listener))
        try:
            await use(running)
        finally:
            running.store.go_on.set()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    with ExitStack() as opened:
        pools = Pools(base / "pools", keep=True)
        opened.callback(pools.close)
        opened.enter_context(fakes.pool(base / "pools", "web"))
        store = opened.enter_context(closing(SlowStore(base / "state")))
        config = parse_config("")
        made = Administration(pools, store, config, TOTAL)
        made.adopt()
        governor = Governor(pools, made.settings, config)
        listener = listen(base / "socket", None, opened)
        server, maintenance = Server(made, governor, Access(frozenset()), PATIENCE), Maintenance(made, governor)
        asyncio.run(running_tmemd(server, maintenance, listener, Running(made, store, governor, base / "socket")))


def test_nobody_waits_for_the_disk_but_those_who_change_something(base: Path) -> None:
    during(base, meanwhile)


async def many_at_once(running: Running) -> None:
    """One user asks over many connections, in one turn of the loop."""
    loop = asyncio.get_running_loop()
    turn, answered = 0, []
    perform = running.administration.perform

    def count() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count)

    async def noted(request: protocol.Request) -> protocol.Answer:
        answered.append(turn)
        return await perform(request)

    running.administration.perform = noted  # type: ignore[method-assign]
    with ExitStack() as opened:
        clients = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(20)]
        for client in clients:
            client.connect(str(running.socket))
            client.setblocking(False)
        loop.call_soon(count)
        while turn < 1000:  # in each of which one of them is accepted
            await asyncio.sleep(0)
        for client in clients:
            client.send(protocol.encode(protocol.List(long=True)))
        await asyncio.gather(*(loop.sock_recv(client, 1) for client in clients))
    assert len(set(answered)) == len(clients)


def test_one_user_who_asks_a_lot_leaves_others_their_turn(base: Path) -> None:
    during(base, many_at_once)
