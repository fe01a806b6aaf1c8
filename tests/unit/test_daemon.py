# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.harness import wait_until
from tests.support.mounts import mountable
from tmemd import protocol
from tmemd.client import attach_pool
from tmemd.daemon.sdnotify import notify
from tmemd.daemon.server import listen
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError

MIB = fakes.MIB


@pytest.fixture
def tmemd(base: Path) -> Iterator[fakes.Tmemd]:
    with fakes.tmemd(base, "--timeout=1") as running:
        yield running


def raw(path: Path, data: bytes, *, half: bool = False) -> bytes:
    """What comes back for these bytes; with *half* we go on listening without ending the message."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(data)
        if not half:
            sock.shutdown(socket.SHUT_WR)
        answer = bytearray()
        # What tmemd leaves unread when it hangs up resets the connection, after its answer.
        with suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                answer += chunk
        return bytes(answer)


def test_attach_gives_an_own_open_file_of_a_new_pool(tmemd: fakes.Tmemd) -> None:
    fd, path = attach_pool(tmemd.socket, tmemd.attach("web", limit=100 * MIB))
    try:
        status = os.fstat(fd)
        assert os.path.samestat(status, Path(path).stat())
        assert (status.st_uid, status.st_mode & 0o777) == (os.geteuid(), 0o600)
        assert poolfile.read_identity(fd, path) is None
        assert poolfile.read_control(fd).target == 100 * MIB
        assert not os.get_inheritable(fd)
        assert poolfile.lock(fd)
        fakes.finish_pool(fd, "web", pid=4711)
        (seen,) = tmemd.client.pools()
        assert (seen.name, seen.served, seen.flat()["pid"]) == ("web", True, 4711)
    finally:
        os.close(fd)
    assert not tmemd.client.pool("web").served


def test_who_attaches_and_only_fills_his_pool_is_seen_and_cut_back(tmemd: fakes.Tmemd) -> None:
    fd, _ = attach_pool(tmemd.socket, tmemd.attach("greedy"))
    try:
        os.posix_fallocate(fd, 0, 64 * MIB)
        command = [sys.executable, "-m", "tmemd.cli", "list", f"--socket={tmemd.socket}"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert [line.split()[1] for line in listed.splitlines() if line.startswith("greedy ")] == ["unfinished"]
        wait_until(lambda: os.fstat(fd).st_blocks * 512 < MIB, "its memory to be given back")
    finally:
        os.close(fd)


def test_in_a_full_tmpfs_a_device_is_refused_without_a_traceback(tmp_path: Path) -> None:
    with mountable(tmp_path / "pools") as path, fakes.tmemd(tmp_path, "--tmpfs-size=1M") as running:
        with fakes.pool(path, "web", size=MIB) as fd:
            os.posix_fallocate(fd, 0, MIB - 64 * 1024)
            subprocess.run(
                ["fallocate", "--punch-hole", "--offset=8192", "--length=4096", path / "web.pool"], check=True
            )
            with open(path / "full", "wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            for name in ("new", "web"):
                with pytest.raises(PoolError, match="No space left on device"):
                    attach_pool(running.socket, running.attach(name, size=MIB))
            assert [entry.name for entry in path.iterdir() if entry.name != "full"] == ["web.pool"]
        running.stop()
        assert running.process.stderr
        assert "Traceback" not in running.process.stderr.read()


def test_a_limit_or_a_cap_or_the_size_is_the_first_target(base: Path) -> None:
    config = base / "config"
    config.write_text('[pools.b]\ncap = "7M"\n[pools.c]\ncap = "1G"\n')
    with fakes.tmemd(base, f"--config={config}") as running:
        for name, limit, target in (("a", 9 * MIB, 9 * MIB), ("b", None, 7 * MIB), ("c", None, 64 * MIB)):
            fd, _ = attach_pool(running.socket, running.attach(name, limit=limit))
            assert poolfile.read_control(fd).target == target
            os.close(fd)


def test_a_target_once_set_survives_and_one_at_the_limit_follows_it(tmemd: fakes.Tmemd) -> None:
    fd, _ = attach_pool(tmemd.socket, tmemd.attach("web", limit=100 * MIB))
    fakes.finish_pool(fd, "web", limit_bytes=100 * MIB)
    os.close(fd)
    fd, _ = attach_pool(tmemd.socket, tmemd.attach("web", limit=200 * MIB))
    assert poolfile.read_control(fd).target == 200 * MIB
    tmemd.client.set_target("web", 50 * MIB)
    os.close(fd)
    fd, _ = attach_pool(tmemd.socket, tmemd.attach("web", limit=200 * MIB))
    assert poolfile.read_control(fd).target == 50 * MIB
    os.close(fd)


def test_a_pool_of_another_size_is_refused(tmemd: fakes.Tmemd) -> None:
    with fakes.pool(tmemd.directory, "web", 64 * MIB) as fd:
        with pytest.raises(PoolError, match="not 4194304"):
            attach_pool(tmemd.socket, tmemd.attach("web", 4 * MIB))
        assert poolfile.read_control(fd).target is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(base: Path, number: signal.Signals) -> None:
    with fakes.tmemd(base) as running, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(running.socket))
        assert running.stop(number) == 0
        assert not running.socket.exists()


@pytest.mark.parametrize("loaded", ["argparse", "asyncio", "msgspec", "psutil", "prometheus_client"])
def test_ctrl_c_while_it_loads_is_no_traceback(tmp_path: Path, loaded: str) -> None:
    (tmp_path / f"{loaded}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "tmemd.daemon", "--check-config"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_restarted_tmemd_adopts_its_pools(base: Path) -> None:
    with fakes.tmemd(base) as first:
        fd, _ = attach_pool(first.socket, first.attach("web"))
        fakes.finish_pool(fd, "web")
        first.client.set_target("web", 10 * MIB)
        first.client.set_frozen("web", True)
        first.stop(signal.SIGKILL)
    with fakes.tmemd(base) as second:
        status = second.client.pool("web")
        assert (status.target_bytes, status.frozen) == (10 * MIB, True)
        second.client.set_frozen("web", False)
        assert not poolfile.read_control(fd).frozen
    os.close(fd)


def test_two_on_one_socket_are_one_too_many(tmemd: fakes.Tmemd) -> None:
    command = [sys.executable, "-m", "tmemd.daemon", f"--socket={tmemd.socket}", f"--pools={tmemd.directory}"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 1
    assert "another tmemd" in second.stderr
    assert tmemd.client.pools() == []


def test_a_directory_that_is_not_on_tmpfs_is_refused(base: Path, tmp_path: Path) -> None:
    if os.statvfs(tmp_path).f_fsid == os.statvfs(base).f_fsid:
        pytest.skip("temporary files are on tmpfs here")
    command = [
        sys.executable,
        "-m",
        "tmemd.daemon",
        f"--socket={base}/s",
        f"--pools={tmp_path}",
        f"--state={base}/state",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "not on tmpfs" in done.stderr


HOSTILE = [
    b"\n",
    b"\0" * 100 + b"\n",
    b'{"type":"show","name":"../../etc/passwd"}\n',
    b'{"type":"destroy","name":"-rf"}\n',
    b'{"type":"freeze","name":"web","frozen":"yes"}\n',
    b'{"type":"list"}\n{"type":"list"}\n',
    b'{"type":"list"}\nmore',
    b"x" * (protocol.MAX_REQUEST * 4),
    b"[" * 4000 + b"\n",
]


@pytest.mark.parametrize("data", HOSTILE)
def test_hostile_bytes_get_an_error_and_change_nothing(tmemd: fakes.Tmemd, data: bytes) -> None:
    with fakes.pool(tmemd.directory, "web") as fd:
        before = os.pread(fd, 16384, 0)
        assert isinstance(protocol.decode_answer(raw(tmemd.socket, data)), protocol.Failed)
        assert os.pread(fd, 16384, 0) == before
        assert [path.name for path in tmemd.directory.iterdir()] == ["web.pool"]
        assert len(tmemd.client.pools()) == 1


def test_a_request_may_be_as_long_as_the_longest(tmemd: fakes.Tmemd) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmemd.socket))
        sock.sendall(b'{"type":"list"}'.ljust(protocol.MAX_REQUEST))
        unread = array.array("i", [1])
        wait_until(lambda: not fcntl.ioctl(sock, termios.TIOCOUTQ, unread) and not unread[0], "it to be read")
        sock.sendall(b"\n")
        assert isinstance(protocol.decode_answer(sock.recv(65536)), protocol.Listed)


def test_half_a_message_gets_no_answer_and_a_slow_one_an_error(tmemd: fakes.Tmemd) -> None:
    half = b'{"type":"list"'
    assert raw(tmemd.socket, half) == b""
    answer = protocol.decode_answer(raw(tmemd.socket, half, half=True))
    assert isinstance(answer, protocol.Failed)
    assert "longer than" in answer.error


def test_descriptors_sent_to_it_are_not_kept(tmemd: fakes.Tmemd) -> None:
    def open_files() -> int:
        return len(list(Path(f"/proc/{tmemd.process.pid}/fd").iterdir()))

    before = open_files()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmemd.socket))
            fds = array.array("i", [0] * 8)
            sock.sendmsg([b'{"type":"list"}\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            while sock.recv(65536):
                pass
    assert tmemd.client.pools() == []
    assert open_files() <= before + 1


def test_a_thousand_connections_leave_it_working(base: Path) -> None:
    with fakes.tmemd(base, "--timeout=2") as running:
        with ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(1000)]
            for sock in socks:
                sock.connect(str(running.socket))
            answers = [protocol.decode_answer(sock.recv(65536)) for sock in socks]
        errors = {answer.error.partition(" ")[0] for answer in answers if isinstance(answer, protocol.Failed)}
        assert errors == {"too", "the"}  # many connections; request took too long
        assert running.client.pools() == []
        assert len(list(Path(f"/proc/{running.process.pid}/fd").iterdir())) < 20


def test_readiness_is_told_to_systemd(base: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(base / "notify"))
        manager.settimeout(20)
        command = [
            sys.executable,
            "-m",
            "tmemd.daemon",
            f"--socket={base}/s",
            f"--pools={base}/pools",
            f"--state={base}/state",
            "--config=/dev/null",
        ]
        environment = os.environ | {"NOTIFY_SOCKET": str(base / "notify")}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            assert manager.recv(100) == b"READY=1"
            assert (base / "s").is_socket()
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
        assert process.returncode == 0


def test_without_systemd_readiness_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "nonsense", "/nowhere/at/all", "@tmemd-no-such-socket"):
        monkeypatch.setenv("NOTIFY_SOCKET", value)
        notify("READY=1")


AS_NOBODY = """
import json, os, sys
from pathlib import Path
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
from tmemd import client, protocol
from tmemd.store import poolfile
path = Path(sys.argv[1])
seen = {}
def attempt(name, call):
    try:
        seen[name] = call()
    except poolfile.PoolError as error:
        seen[name] = str(error)
asked = client.Client.of_daemon(path)
attempt("attach", lambda: os.fstat(client.attach_pool(path, protocol.Attach("mine", 1 << 20, True))[0]).st_uid)
attempt("attach second", lambda: client.attach_pool(path, protocol.Attach("second", 1 << 20, True)))
attempt("attach other", lambda: client.attach_pool(path, protocol.Attach("theirs", 1 << 26, True)))
attempt("list", lambda: [status.name for status in asked.pools()])
attempt("show other", lambda: asked.pool("theirs").name)
attempt("freeze own", lambda: asked.set_frozen("mine", True))
attempt("freeze other", lambda: asked.set_frozen("theirs", True))
attempt("destroy other", lambda: asked.destroy("theirs", lose_pages=True))
print(json.dumps(seen))
"""


def as_nobody(running: fakes.Tmemd) -> dict[str, object]:
    command = [sys.executable, "-c", AS_NOBODY, str(running.socket)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    seen: dict[str, object] = json.loads(done.stdout)
    return seen


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_other_users_see_and_attach_only_their_own(base: Path) -> None:
    options = ("--allow-user=nobody", "--group=65534")
    with fakes.tmemd(base, *options, config="pools_per_user = 1") as running, fakes.pool(running.directory, "theirs"):
        seen = as_nobody(running)
        assert "user 65534 has 1 pools, and may not have more" in str(seen["attach second"])
        assert seen["attach"] == 65534
        assert "another user" in str(seen["attach other"])
        assert seen["list"] == ["mine"]  # which is unfinished; theirs is hidden
        assert "another user" in str(seen["show other"])
        for change in ("freeze own", "freeze other", "destroy other"):
            assert "only root" in str(seen[change])
        with fakes.pool(running.directory, "mine"):
            assert as_nobody(running)["list"] == ["mine"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_who_takes_more_than_a_share_where_nobody_serves_it_gets_no_new_pool(base: Path) -> None:
    options = ("--allow-user=nobody", "--group=65534")
    config = "[budget]\nminimum = '64M'\nmaximum = '64M'\n"
    with (
        fakes.tmemd(base, *options, config=config) as running,
        fakes.pool(running.directory, "theirs"),
        fakes.pool(running.directory, "mine", size=MIB) as fd,
    ):
        os.fchown(fd, 65534, -1)
        os.posix_fallocate(fd, 0, 40 * MIB)
        wait_until(lambda: running.client.host().used_bytes > 40 * MIB, "it to be counted")
        seen = as_nobody(running)
        assert seen["attach"] == 65534, "it may be served"
        assert "nobody serves and that take 40.0M of RAM, more than a share of 32.0M" in str(seen["attach second"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_users_who_are_not_trusted_cannot_attach(base: Path) -> None:
    with fakes.tmemd(base, "--group=65534") as running:
        assert "--allow-user" in str(as_nobody(running)["attach"])
        assert list(running.directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_without_a_group_nobody_else_connects(tmemd: fakes.Tmemd) -> None:
    assert "Permission denied" in str(as_nobody(tmemd)["list"])


def test_a_socket_that_cannot_be_made_is_one_line(base: Path) -> None:
    path = base / ("x" * 120)
    command = [sys.executable, "-m", "tmemd.daemon", f"--pools={base}", f"--socket={path}", f"--state={base}/state"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, f"tmemd: {path}: AF_UNIX path too long\n")


def line_with(running: fakes.Tmemd, words: str) -> str:
    """The next line of tmemd's log with these words."""
    assert running.process.stderr
    for line in running.process.stderr:
        if words in line:
            return line
    raise AssertionError(f"tmemd ended and never said {words!r}")


def test_sighup_reads_the_configuration_again_and_a_bad_one_changes_nothing(base: Path) -> None:
    config = base / "config"
    config.write_text("[pools.web]\nweight = 7\n")
    with fakes.tmemd(base, f"--config={config}") as running, fakes.pool(running.directory, "web") as fd:
        assert running.client.pool("web").settings.weight == 7
        config.write_text("[pools.web]\nweight = 8\ncompression = false\n")
        running.process.send_signal(signal.SIGHUP)
        line_with(running, "configuration read again")
        assert running.client.pool("web").settings.weight == 8
        assert not poolfile.read_control(fd).compression
        for bad in ("[pools.web]\nweight = 0\n", '[budget]\nminimum = "99%"\n', 'policy = "none"'):
            config.write_text(bad)
            running.process.send_signal(signal.SIGHUP)
            assert line_with(running, "the configuration stays as it was").startswith(f"tmemd: {config}: ")
            assert running.client.pool("web").settings.weight == 8
        config.unlink()
        running.process.send_signal(signal.SIGHUP)
        assert "No such file" in line_with(running, "the configuration stays as it was")
        assert [problem.what for problem in running.client.host().problems] == ["configuration"]
        config.write_text("[pools.web]\nweight = 9\n")
        line_with(running, "mended")
        assert running.client.pool("web").settings.weight == 9
        assert running.client.host().problems == []


def test_sighup_while_pools_cannot_be_looked_at_is_carried_out_whole(base: Path) -> None:
    config = base / "config"
    config.write_text("[pools.web]\nweight = 7\n")
    with fakes.tmemd(base, f"--config={config}") as running, fakes.pool(running.directory, "web") as fd:
        config.write_text('policy = "static"\n[pools.web]\nweight = 8\ncompression = false\n')
        away = running.directory.rename(base / "away")
        running.process.send_signal(signal.SIGHUP)
        line_with(running, "configuration read again")
        away.rename(running.directory)
        wait_until(lambda: [pool.settings.weight for pool in running.client.pools()] == [8], "pools to be found again")
        wait_until(lambda: running.client.host().policy == "static", "the governor to go by it")
        running.process.send_signal(signal.SIGHUP)
        line_with(running, "configuration read again")
        assert not poolfile.read_control(fd).compression


def test_what_was_done_is_logged_in_words(base: Path) -> None:
    with fakes.tmemd(base) as running, fakes.pool(running.directory, "web"):
        running.client.set("web", weight=300, cap=100 * MIB, target=None, forget=frozenset({"compression"}))
        words = "set target=auto weight=300 cap=100M compression=default of pool web"
        assert line_with(running, "weight") == f"tmemd: user {os.geteuid()} {words}\n"
        running.client.set_frozen(None, True)
        assert "froze all pools" in line_with(running, "user")


def told_of(running: fakes.Tmemd) -> dict[str, str]:
    """The problems that tmemd has, which must be told in the same words wherever somebody looks."""
    problems = {problem.what: problem.words for problem in running.client.host().problems}
    for command in (["list"], ["list", "--json"], ["host"], ["top", "--once", "--interval=0.1"]):
        done = subprocess.run(
            [sys.executable, "-m", "tmemd.cli", *command, f"--socket={running.socket}"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        shown = done.stdout + done.stderr
        assert all(words[:100] in shown for words in problems.values()), shown
    for command in (["host", "--json"], ["top", "--once", "--interval=0.1", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "tmemd.cli", *command, f"--socket={running.socket}"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        answer = json.loads(done.stdout)
        told = answer.get("host", answer)["problems"]
        assert {problem["what"]: problem["words"] for problem in told} == problems
    return problems


@pytest.mark.parametrize("bad", ["weight = 1", "[[", '[budget]\nminimum = "99%"', None])
def test_a_bad_configuration_at_the_start_is_said_and_devices_have_their_pools(base: Path, bad: str | None) -> None:
    config = base / "config"
    if bad is not None:
        config.write_text(bad)
    with fakes.tmemd(base, f"--config={config}") as running:
        os.close(attach_pool(running.socket, running.attach("web"))[0])
        (words,) = told_of(running).values()
        assert words.startswith(f"{config}: ")
        config.write_text("[pools.web]\nweight = 9\n")
        line_with(running, f"mended: {config}: ")
        assert running.client.host().problems == []


def test_minimums_that_the_host_does_not_have_are_said_and_devices_have_their_pools(base: Path) -> None:
    config = "[budget]\nmaximum = '300M'\nreserve = '1M'\n[pools.web]\nminimum = '400M'\n[pools.db]\nminimum = '200M'\n"
    with fakes.tmemd(base, config=config) as running, ExitStack() as plugins:
        for name in ("web", "db"):
            fd, _ = attach_pool(running.socket, running.attach(name, limit=1 << 30))
            plugins.callback(os.close, fd)
            assert poolfile.lock(fd)
            fakes.finish_pool(fd, name, limit_bytes=1 << 30)
        problems = told_of(running)
        assert "minimums of 600M in all" in problems["configuration"]
        assert "minimums and fixed targets are 600M in all" in problems["promises"]
        wait_until(lambda: running.client.host().targets_bytes == 300 * MIB, "targets to be within the budget")
        assert [status.target_bytes // MIB for status in running.client.pools()] == [100, 200]


@pytest.mark.parametrize(("text", "status"), [('policy = "fair"', 0), ('policy = "none"', 1)])
def test_a_configuration_can_be_checked_without_starting(base: Path, text: str, status: int) -> None:
    (base / "config").write_text(text)
    command = [sys.executable, "-m", "tmemd.daemon", "--check-config", f"--config={base}/config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == status
    assert bool(done.stderr) == bool(status)
    assert [path.name for path in base.iterdir()] == ["config"]


def test_damaged_settings_are_said_and_kept_and_devices_have_their_pools(base: Path) -> None:
    (base / "state").write_text('{"version":1,"poo')
    with fakes.tmemd(base) as running:
        os.close(attach_pool(running.socket, running.attach("web"))[0])
        (words,) = told_of(running).values()
        assert words.startswith(f"{base}/state: the kept settings are damaged")
        assert (base / "state").read_text() == '{"version":1,"poo'
        (base / "state").write_text('{"version":2,"pools":{"web":{"weight":7}}}')
        line_with(running, "mended")
        assert running.client.host().problems == []
        with fakes.pool(running.directory, "web"):
            assert running.client.pool("web").settings.weight == 7


def test_the_sets_of_a_full_disk_are_told_by_tmemctl(base: Path) -> None:
    (base / "state.new").mkdir()
    with fakes.tmemd(base) as running, fakes.pool(running.directory, "web") as fd:
        for command in (["set", "web", "--target=9M"], ["freeze", "--all"]):
            done = subprocess.run(
                [sys.executable, "-m", "tmemd.cli", *command, f"--socket={running.socket}"],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            assert done.stderr.startswith(f"tmemctl: cannot keep settings in {base}/state: Is a directory")
        assert (poolfile.read_control(fd).target, poolfile.read_control(fd).frozen) == (9 * MIB, True)


def test_a_metrics_address_that_is_not_there_yet_is_said_and_served_when_it_comes(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = fakes.start_tmemd(base, f"--metrics=127.0.0.1:{port}")
        with running.process:
            try:
                assert told_of(running)["metrics"].startswith(f"cannot serve metrics on 127.0.0.1:{port}: ")
                taken.close()
                line_with(running, "mended")
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                    assert b"tmemd_problem{" not in answer.read()
            finally:
                running.process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_other_users_cannot_keep_it_from_starting(base: Path) -> None:
    """The locks of a tmemd that ran once: to take one it is enough to be able to read it."""
    with fakes.tmemd(base) as first:
        first.stop()
    script = (
        "import fcntl, os, sys; os.setresuid(65534, 65534, 65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB); print('locked', path)\n"
        "    except PermissionError: pass\n"
        "print(flush=True); sys.stdin.read()"
    )
    locks = [str(base / f"{name}.lock") for name in ("socket", "state")]
    command = [sys.executable, "-c", script, *locks, str(base / "pools")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "\n"
        with fakes.tmemd(base) as second:
            assert second.client.pools() == []


def test_a_file_in_the_socket_s_place_is_not_removed(base: Path) -> None:
    (base / "socket").write_text("precious")
    with pytest.raises(RuntimeError, match=f"tmemd: {base}/socket is there already, and is no socket"):
        fakes.start_tmemd(base)
    assert (base / "socket").read_text() == "precious"


def test_settings_survive_sigkill(base: Path) -> None:
    with fakes.tmemd(base) as first, fakes.pool(first.directory, "web"):
        first.client.set_frozen("web", True)
        first.client.set_target("web", 9 * MIB)
        first.stop(signal.SIGKILL)
        with fakes.tmemd(base) as second:
            settings = second.client.pool("web").settings
            assert (settings.frozen, settings.target) == (True, 9 * MIB)


def test_targets_keep_to_the_budget_and_the_host_s_state_can_be_asked_for(base: Path) -> None:
    config = "[budget]\nminimum = '300M'\nmaximum = '300M'\nreserve = '1M'\n"
    with fakes.tmemd(base, config=config) as running, ExitStack() as plugins:
        for name in ("first", "second"):
            fd, _ = attach_pool(running.socket, running.attach(name, limit=200 * MIB))
            plugins.callback(os.close, fd)
            assert poolfile.lock(fd)
            fakes.finish_pool(fd, name, limit_bytes=200 * MIB)
            assert poolfile.read_control(fd).target == (200 if name == "first" else 100) * MIB
            wait_until(lambda: running.client.host().targets_bytes > 0, "the pool to be governed")
        wait_until(lambda: running.client.host().targets_bytes == 300 * MIB, "both to be governed")
        host = running.client.host()
        assert (host.policy, host.budget_bytes) == ("fair", 300 * MIB)
        assert 0 < host.available_bytes < host.total_bytes
        targets = [status.target_bytes for status in running.client.pools()]
        assert targets == [150 * MIB, 150 * MIB]
        running.client.set_target("first", 60 * MIB)
        wait_until(lambda: running.client.pool("second").target_bytes == 200 * MIB, "the rest to be given")
        assert running.client.pool("first").target_bytes == 60 * MIB


def test_after_sigkill_targets_go_on_from_what_they_were(base: Path) -> None:
    config = "[budget]\nminimum = '{}'\nmaximum = '400M'\nreserve = '{}'\npressure = 100\n"
    (base / "pools").mkdir()
    with ExitStack() as plugins:
        fds = [plugins.enter_context(fakes.pool(base / "pools", name)) for name in "ab"]
        assert all(poolfile.lock(fd) for fd in fds)
        with fakes.tmemd(base, config=config.format("300M", "100%")) as first:
            wait_until(lambda: targets(fds) == [150 * MIB] * 2, "targets to be set")
            first.stop(signal.SIGKILL)
        with fakes.tmemd(base, config=config.format("0", "1M")):
            lowest = []

            def has_all() -> bool:
                lowest.append(min(targets(fds)))
                return lowest[-1] == 200 * MIB

            wait_until(has_all, "the rest to be given")
        assert lowest == sorted(lowest)
        assert lowest[0] >= 150 * MIB


def targets(fds: list[int]) -> list[int]:
    return [poolfile.read_control(fd).target or 0 for fd in fds]


def test_a_socket_that_somebody_has_removed_is_no_error_at_the_end(tmp_path: Path) -> None:
    with ExitStack() as resources:
        listen(tmp_path / "tmemd.sock", None, resources)
        (tmp_path / "tmemd.sock").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["tmemd.sock.lock"]
