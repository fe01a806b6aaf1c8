# SPDX-License-Identifier: BSD-3-Clause
"""Pools belong to who opened them: nobody else attaches, reads or administers them, nor does an owner harm tmemd."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import fakes
from tests.support.harness import Serve, device, wait_until
from tmemd.client import attach_pool
from tmemd.daemon.directory import prepare_directory
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError
from tmemd.system import locks

MIB = fakes.MIB
NOBODY, OTHER = 65534, 65533
PAGES = 16384  # bytes of the pages of a pool file that tmemd reads

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")


@pytest.fixture
def tmemd(base: Path) -> Iterator[fakes.Tmemd]:
    """A tmemd that trusts two users, with its directory as it makes it itself."""
    group = 65534
    where = base / "own"
    with fakes.tmemd(base, f"--pools={where}", f"--allow-user={NOBODY}", f"--allow-user={OTHER}") as running:
        os.chown(running.socket, -1, group)
        running.directory = where
        yield running


AS_USER = """
import json, os, sys
from pathlib import Path
uid = int(sys.argv[1])
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(uid, uid, uid)
from tmemd import client, protocol
from tmemd.store import poolfile
seen = {}
def attempt(name, call):
    try:
        seen[name] = call()
    except (poolfile.PoolError, OSError) as error:
        seen[name] = str(error)
path, targets = Path(sys.argv[2]), sys.argv[3:]
"""


def as_user(uid: int, script: str, path: Path, *targets: object) -> dict[str, object]:
    """What *script* noted in `seen` when that user ran it."""
    command = [sys.executable, "-c", AS_USER + script + "\nprint(json.dumps(seen))", str(uid), str(path)]
    command += [str(target) for target in targets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, object] = json.loads(done.stdout)
    return seen


OPEN = """
for target in targets:
    for mode, flags in ("read", os.O_RDONLY), ("write", os.O_RDWR):
        attempt(f"{mode} {target}", lambda: os.close(os.open(target, flags)))
    attempt(f"stat {target}", lambda: os.stat(target).st_size)
    attempt(f"unlink {target}", lambda: os.unlink(target))
    attempt(f"truncate {target}", lambda: os.truncate(target, 0))
    attempt(f"link {target}", lambda: os.link(target, f"{target}.link"))
    attempt(f"rename {target}", lambda: os.rename(target, f"{target}.moved"))
attempt("list", lambda: os.listdir(path))
attempt("plant", lambda: os.symlink("/etc/passwd", path / "planted.pool"))
"""


@needs_root
def test_files_and_directory_keep_other_users_out(tmemd: fakes.Tmemd) -> None:
    own = as_user(
        NOBODY,
        "attempt('attach', lambda: os.close(client.attach_pool(path, protocol.Attach('mine', 1 << 26, True))[0]))",
        tmemd.socket,
    )
    assert own == {"attach": None}
    pool = tmemd.directory / "mine.pool"
    assert (pool.stat().st_uid, pool.stat().st_mode & 0o7777) == (NOBODY, 0o600)
    assert (tmemd.directory.stat().st_uid, tmemd.directory.stat().st_mode & 0o7777) == (0, 0o711)
    seen = as_user(OTHER, OPEN, tmemd.directory, pool)
    assert isinstance(seen.pop(f"stat {pool}"), int)  # that it is there is no secret to who knows its name
    assert all("denied" in str(answer) or "not permitted" in str(answer) for answer in seen.values()), seen


OF_ANOTHER = """
asked = client.Client.of_daemon(path)
attempt("attach", lambda: client.attach_pool(path, protocol.Attach("mine", 1 << 26, True)))
attempt("attach size", lambda: client.attach_pool(path, protocol.Attach("mine", 4096, False, 1)))
attempt("show", lambda: asked.pool("mine").name)
attempt("list", lambda: [status.name for status in asked.pools(long=True)])
attempt("set", lambda: asked.set_target("mine", 1 << 20))
attempt("freeze", lambda: asked.set_frozen("mine", True))
attempt("ask", lambda: asked.ask("mine", "drain"))
attempt("destroy", lambda: asked.destroy("mine", lose_pages=True))
"""


@needs_root
@pytest.mark.parametrize("uid", [OTHER, 0])
def test_another_user_cannot_attach_and_only_root_administers(tmemd: fakes.Tmemd, uid: int) -> None:
    with fakes.pool(tmemd.directory, "mine") as fd:
        os.fchown(fd, NOBODY, -1)
        before = os.pread(fd, PAGES, 0)
        seen = as_user(uid, OF_ANOTHER, tmemd.socket)
        assert "another user" in str(seen["attach"])
        assert "another user" in str(seen["attach size"])
        if uid:
            assert "another user" in str(seen["show"])
            assert seen["list"] == []
            for change in ("set", "freeze", "ask", "destroy"):
                assert "only root" in str(seen[change])
            assert os.pread(fd, PAGES, 0) == before
        else:
            assert (seen["show"], seen["list"], seen["freeze"]) == ("mine", ["mine"], None)
            assert not (tmemd.directory / "mine.pool").exists()


PROC = """
for pid in targets:
    for name in ("fd", "map_files"):
        attempt(f"{pid} {name}", lambda: [os.open(f"/proc/{pid}/{name}/{n}", os.O_RDWR) for n in range(64)])
        attempt(f"{pid} {name} list", lambda: os.listdir(f"/proc/{pid}/{name}"))
    for name in ("mem", "environ", "cwd", "root"):
        attempt(f"{pid} {name}", lambda: os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
    attempt(f"{pid} signal", lambda: os.kill(int(pid), 19))
"""


@needs_root
def test_proc_leads_nobody_into_a_pool(tmemd: fakes.Tmemd, serve: Serve, tmp_path: Path) -> None:
    server = serve(device("web", tmemd.directory, 4 * MIB, tmp_path / "backing", 4 * MIB, tmemd=tmemd.socket))
    seen = as_user(NOBODY, PROC, tmemd.socket, tmemd.process.pid, server.pid)
    assert len(seen) == 18
    refusals = ("denied", "not permitted", "No such file")
    assert all(any(word in str(answer) for word in refusals) for answer in seen.values()), seen


def plant_symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def plant_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def plant_fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def plant_directory(path: Path, _: Path) -> None:
    path.mkdir()


def plant_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def plant_link_to_nothing(path: Path, _: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "plant",
    [plant_symlink, plant_hard_link, plant_fifo, plant_directory, plant_socket, plant_link_to_nothing],
)
def test_what_is_planted_is_no_pool(tmemd: fakes.Tmemd, base: Path, plant: Callable[[Path, Path], None]) -> None:
    victim = base / "victim"
    victim.write_bytes(bytes(PAGES))
    planted = tmemd.directory / "web.pool"
    plant(planted, victim)
    before = planted.lstat()
    for call in (
        lambda: os.close(attach_pool(tmemd.socket, tmemd.attach("web"))[0]),
        lambda: tmemd.client.pool("web"),
        lambda: tmemd.client.set_target("web", MIB),
        lambda: tmemd.client.set_frozen("web", True),
        lambda: tmemd.client.ask("web", "drain"),
        lambda: tmemd.client.destroy("web", lose_pages=True),
    ):
        with pytest.raises(PoolError, match="web"):
            call()
    assert tmemd.client.pools() == []
    assert planted.lstat().st_ino == before.st_ino
    assert victim.read_bytes() == bytes(PAGES)
    with fakes.pool(tmemd.directory, "good"):
        assert tmemd.client.pool("good").name == "good"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o731])
def test_a_directory_that_others_may_write_to_is_refused(base: Path, mode: int) -> None:
    place = base / "open"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(PoolError, match="others may write"):
        prepare_directory(place, None)


@needs_root
def test_a_directory_of_somebody_else_is_refused(base: Path) -> None:
    place = base / "theirs"
    place.mkdir()
    os.chown(place, NOBODY, -1)
    with pytest.raises(PoolError, match="belongs to"):
        prepare_directory(place, None)


AS_MANY_USERS = """
children = []
for uid in targets:
    if not os.fork():
        os.setresuid(int(uid), int(uid), int(uid))
        os.close(client.attach_pool(path, protocol.Attach(f"of-{uid}", 1 << 26, True))[0])
        os._exit(0)
    children.append(os.wait()[1])
seen["statuses"] = sorted(set(children))
"""


@needs_root
def test_a_group_is_trusted_for_all_its_users_each_with_his_own_pools(base: Path) -> None:
    """More of them than one user may have pools."""
    users = range(60000, 60070)
    with fakes.tmemd(base, "--group=65534", "--allow-group=65534") as running:
        assert as_user(0, AS_MANY_USERS, running.socket, *users) == {"statuses": [0]}
        owners = {pool.name: (pool.stat().st_uid, pool.stat().st_mode & 0o777) for pool in running.directory.iterdir()}
    assert owners == {f"of-{uid}.pool": (uid, 0o600) for uid in users}


ONLY_A_MEMBER = """
attempt("attach", lambda: client.attach_pool(path, protocol.Attach("mine", 1 << 26, True)))
"""


@needs_root
def test_being_in_another_group_gets_nobody_trusted(base: Path) -> None:
    with fakes.tmemd(base, "--group=65534", "--allow-group=65533") as running:
        assert "--allow-group" in str(as_user(NOBODY, ONLY_A_MEMBER, running.socket)["attach"])
        assert list(running.directory.iterdir()) == []


ALL_ONES = b"\xff" * 8
HUGE = (1 << 60).to_bytes(8, "little")


@contextmanager
def scribbled(tmemd: fakes.Tmemd) -> Iterator[int]:
    """A pool that its owner serves, to be damaged."""
    with fakes.pool(tmemd.directory, "bad") as fd:
        try:
            yield fd
        finally:
            (tmemd.directory / "bad.pool").unlink()


def look(tmemd: fakes.Tmemd) -> None:
    """Everything that reads pools answers, and says the truth about the good one."""
    statuses = {status.name: status for status in tmemd.client.pools(long=True)}
    assert statuses["good"].error is None
    assert statuses["good"].counters.limit_bytes == fakes.LIMIT
    with suppress(PoolError):
        tmemd.client.pool("bad")
    with suppress(PoolError):
        tmemd.client.host()
    for status in statuses.values():
        json.dumps(status.flat())


@pytest.fixture(scope="module")
def shared() -> Iterator[fakes.Tmemd]:
    with fakes.on_tmpfs() as path, fakes.tmemd(path) as running, fakes.pool(running.directory, "good") as fd:
        assert poolfile.lock(fd)
        yield running


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, PAGES // 8 - 1),
            st.one_of(st.sampled_from([ALL_ONES, HUGE, bytes(8)]), st.binary(min_size=8, max_size=64)),
        ),
        max_size=6,
    ),
    length=st.one_of(st.none(), st.sampled_from([0, 1, 100, 4096, 4097, 8191, 8192, 12288, 12296, 16384, 1 << 40])),
    served=st.booleans(),
)
def test_whatever_an_owner_writes_tmemd_lives(
    shared: fakes.Tmemd, pieces: list[tuple[int, bytes]], length: int | None, served: bool
) -> None:
    with scribbled(shared) as fd:
        if served:
            assert poolfile.lock(fd)
        for word, data in pieces:
            os.pwrite(fd, data, word * 8)
        if length is not None:
            os.ftruncate(fd, length)
        look(shared)


SCRIBBLE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("ready", flush=True)
while os.getppid() == int(sys.argv[2]):
    for length in 0, 5000, 9000, 1 << 30:
        os.ftruncate(fd, length)
        os.pwrite(fd, bytes([255]) * 4096, 4096)
"""


def test_a_pool_that_changes_while_it_is_read_is_survived(shared: fakes.Tmemd) -> None:
    command = [sys.executable, "-c", SCRIBBLE, str(shared.directory / "bad.pool"), str(os.getpid())]
    with scribbled(shared), subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout
            assert owner.stdout.readline()
            for _ in range(50):
                look(shared)
        finally:
            owner.kill()


SPY = """#!/usr/bin/python3
import fcntl, json, os, sys, termios
typed = []
for terminal in ("/dev/tty", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2"):
    try:
        with open(terminal, "rb", buffering=0) as file:
            fcntl.ioctl(file, termios.TIOCSTI, b"x")
        typed.append(terminal)
    except OSError:
        pass
fds = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
seen = {"typed": typed, "fds": fds, "secret": "SECRET" in os.environ, "user": os.getresuid()}
open(sys.argv[0] + ".seen", "w").write(json.dumps(seen))
print("\\x1b[31mred", file=sys.stderr)
sys.exit(1)
"""


@needs_root
def test_what_root_runs_as_the_owner_gets_neither_terminal_nor_anything_else_of_roots(directory: Path) -> None:
    home = directory / "home"
    home.mkdir()
    (home / "spy").write_text(SPY)
    (home / "spy").chmod(0o755)
    with fakes.pool(directory, "web", pages_in_tmem=1) as fd:
        for owned in (home, fd):
            os.chown(owned, NOBODY, NOBODY)
        drain = f"import sys; sys.executable = '{home}/spy'; from tmemd.cli import main; sys.exit(main(sys.argv[1:]))"
        command = shlex.join([sys.executable, "-c", drain, "drain", "web", f"--pools={directory}"])
        done = subprocess.run(
            ["script", "--quiet", "--return", "--command", f"{command} 9</etc/shadow", "/dev/null"],
            env=os.environ | {"SECRET": "of root's"}, capture_output=True, check=False,
        )  # fmt: skip
    seen = json.loads((home / "spy.seen").read_text())
    assert seen == {"typed": [], "fds": [0, 1, 2], "secret": False, "user": [NOBODY] * 3}
    assert done.returncode == 1
    assert done.stdout.splitlines() == [b"'\\x1b[31mred'", b"tmemctl: pool web was not drained"]


@pytest.mark.parametrize("lock", [locks.try_lock, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX)], ids=["ofd", "flock"])
def test_an_owner_that_locks_all_of_its_pool_stays_under_control(base: Path, lock: Callable[[int], object]) -> None:
    """Whatever locks it holds over a restart of tmemd."""
    with fakes.tmemd(base) as first, fakes.pool(first.directory, "held") as fd:
        first.stop(signal.SIGKILL)
        lock(fd)
        with fakes.tmemd(base) as second:
            second.client.set_target("held", 32 * MIB)
            assert poolfile.read_control(fd).target == 32 * MIB
            second.client.set("held", target=None, cap=16 * MIB)
            assert poolfile.read_control(fd).target == 16 * MIB
            wait_until(lambda: second.client.host().used_bytes == os.fstat(fd).st_blocks * 512, "it to be counted")
