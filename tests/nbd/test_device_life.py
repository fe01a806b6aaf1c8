# SPDX-License-Identifier: BSD-3-Clause
"""The life of a device in commands, where there is no systemd: each step, and a fault or a SIGKILL at each."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import fakes
from tests.support.content import PAGE, content
from tests.support.devicehost import GID, client, devicehost, empty, is_written, kill_server, left, states, write
from tests.support.harness import MIB, ROOT, Serve, connect, device
from tests.support.remotes import Remote
from tests.support.vhost.disk import Disk
from tmemd.cli import main
from tmemd.definitions.place import Place
from tmemd.store import poolfile
from tmemd.store.poolfile import PoolError

Output = pytest.CaptureFixture[str]
FAULT = PoolError("the fault")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices are made by root")


@pytest.fixture(scope="module")
def empty_host() -> Iterator[Place]:
    with devicehost() as place:
        yield place


@pytest.fixture
def host(empty_host: Place) -> Iterator[Place]:
    yield empty_host
    empty(empty_host)


def ctl(*command: str) -> int:
    return main(command)


def answer(output: Output, *command: str) -> Any:
    output.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(output.readouterr().out)


def test_a_device_is_made_restarted_stopped_started_and_removed(host: Place, capsys: Output) -> None:
    settings = "--weight=300", "--cap=7M", "--minimum=1M", "--vhost", "-o", "lost=zero"
    assert ctl("create", "web", "--size=8M", *settings) == 0
    assert "reconnect=1" in capsys.readouterr().out
    found = answer(capsys, "show", "web")
    assert (found["weight"], found["cap"], found["minimum"], found["served"]) == (300, 7 << 20, 1 << 20, True)
    assert found["uid"] == host.home("web").stat().st_uid != 0
    assert host.socket("web").stat().st_mode & 0o777 == 0o660
    assert host.socket("web").stat().st_gid == GID + 1
    write(host, "web", 3)
    for change, then in (("restart", "running"), ("stop", "stopped"), ("start", "running"), ("start", "running")):
        assert answer(capsys, change, "web")["state"] == then
        assert states(host) == {"web": then}
    assert is_written(host, "web", 3)
    assert bytes(Disk(host.vhost("web")).pread(PAGE, 3 * PAGE)) == content(3, 1)
    assert ctl("remove", "web") == 1
    assert "4.00K of pages: detach it" in capsys.readouterr().err
    assert ctl("stop", "web") == ctl("remove", "web", "--force") == 0
    assert states(host) == {}


def test_nothing_is_left_of_a_device_that_is_removed(host: Place) -> None:
    before = left(host)
    for options in ([], ["--backing=none"], [f"--backing={host.root}/srv"], [f"--backing={host.root}/srv/file"]):
        assert ctl("create", "web", "--size=8M", *options) == 0
        write(host, "web", 3)
        assert ctl("remove", "web", "--force") == 0
        assert left(host) == before


@pytest.mark.usefixtures("host")
def test_what_was_set_for_a_device_that_was_removed_does_not_hold(capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M", "--weight=300") == ctl("remove", "web") == 0
    assert ctl("create", "web", "--size=8M") == 0
    assert answer(capsys, "show", "web")["weight"] == 100


def test_a_client_keeps_its_device(host: Place, capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M") == 0
    with client(host, "web"):
        assert ctl("remove", "web") == 1
        assert "has a client" in capsys.readouterr().err


def test_a_device_that_another_host_has_stands_by_and_is_as_good_as_served(
    host: Place, serve: Serve, pools: Path, disks: Path
) -> None:
    disks.chmod(0o755)
    with Remote(disks, ["memory", "12M"]).start() as far:
        far.socket.chmod(0o666)
        keys = {"lease": 2, "timeout": 0.5, "flush": "durable"}
        owner = serve(device("web", pools, 8 * MIB, far.uri, 8 * MIB, **keys))
        options = [f"-o{key}={value}" for key, value in (keys | {"standby": "yes"}).items()]
        assert ctl("create", "web", "--size=8M", f"--backing={far.uri}", *options) == 0
        for command in ("restart", "stop", "start"):
            assert ctl(command, "web") == 0
        assert states(host) == {"web": "running"}
        with owner.client() as elsewhere:
            elsewhere.pwrite(content(300, 1), 300 * PAGE)
        handle = connect(host.socket("web"), "web")
        assert bytes(handle.pread(PAGE, 300 * PAGE)) == content(300, 1)
        handle.shutdown()


def test_who_dies_by_himself_has_failed(host: Place) -> None:
    assert ctl("create", "web", "--size=8M") == 0
    write(host, "web", 3)
    kill_server(host, "web")
    assert states(host) == {"web": "failed"}
    assert ctl("start", "web") == 0
    assert states(host) == {"web": "running"}
    assert is_written(host, "web", 3)


def test_another_process_of_its_number_is_not_killed(host: Place) -> None:
    assert ctl("create", "web", "--size=8M") == 0
    noted = host.pid_file("web").read_text()
    assert ctl("stop", "web") == 0
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            host.pid_file("web").write_text(f"{other.pid} {noted.partition(' ')[2]}")
            assert states(host) == {"web": "failed"}
            assert ctl("stop", "web") == 0
            assert other.poll() is None
        finally:
            other.kill()


# In the order in which `create` calls them, and `remove` after the first.
CREATE = (
    "definition.save", "accounts.make", "files.make", "files.check_access", "processes.Processes.install",
    "processes.Processes.start", "devices.Devices._await", "devices.Client.set",
)  # fmt: skip
REMOVE = (
    "definition.save", "processes.Processes.uninstall", "devices.Devices._destroy_pool", "files.remove",
    "accounts.remove", "definition.sync_directory",
)  # fmt: skip


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", CREATE)
def test_a_fault_at_any_step_leaves_nothing(
    host: Place, capsys: Output, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    before = left(host)
    with monkeypatch.context() as patch:
        fail_at(patch, step, moment)
        assert ctl("create", "web", "--size=8M", "--weight=300") == 1
    assert capsys.readouterr().err == "tmemctl: the fault\n"
    assert left(host) == before


def fail_at(patch: pytest.MonkeyPatch, step: str, moment: str, error: BaseException = FAULT) -> None:
    """Have the first call of a function fail, before or after it has done its work."""
    where, name = step.rsplit(".", 1)
    owner = pkgutil.resolve_name(f"tmemd.definitions.{where}")
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> None:
        patch.undo()
        if moment == "after":
            original(*arguments, **options)
        raise error

    patch.setattr(owner, name, call)


# What a process does that is killed before or after the first call of a function.
KILLED = """
import os, pkgutil, signal, sys
from tmemd.cli import main
_, step, moment, *command = sys.argv
where, name = step.rsplit(".", 1)
owner = pkgutil.resolve_name(f"tmemd.definitions.{where}")
original = getattr(owner, name)
def call(*arguments, **options):
    if moment == "after":
        original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, call)
main(command)
"""


def killed_at(step: str, moment: str, *command: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, step, moment, *command], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", CREATE)
def test_killed_at_any_step_create_begins_anew_and_remove_takes_away(host: Place, step: str, moment: str) -> None:
    before = left(host)
    for begun_anew in (False, True):
        killed_at(step, moment, "create", "web", "--size=8M")
        if begun_anew:
            assert ctl("create", "web", "--size=8M") == 0
            write(host, "web", 3)
        if states(host):
            assert states(host) == {"web": "running" if begun_anew else "unfinished"}
            assert ctl("start", "web") == (0 if begun_anew else 1)
            assert ctl("remove", "web", *(["--force"] if begun_anew else [])) == 0
        assert left(host) == before


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", REMOVE)
def test_remove_goes_on_where_it_was_killed(host: Place, step: str, moment: str) -> None:
    before = left(host)
    assert ctl("create", "web", "--size=8M") == 0
    killed_at(step, moment, "remove", "web")
    if states(host):
        assert ctl("remove", "web") == 0
    assert left(host) == before


@pytest.mark.usefixtures("host")
def test_what_is_set_while_a_device_is_away_holds_when_it_comes(capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M") == ctl("stop", "web") == ctl("destroy", "web") == 0
    assert answer(capsys, "set", "web", "--weight=300", "--cap=7M", "--minimum=1M")["state"] == "away"
    assert ctl("set", "web", "--cap=none", "--minimum=1T") == 1
    assert "budget.maximum" in capsys.readouterr().err
    assert ctl("set", "web", "--minimum=8M") == 1
    assert "above its cap" in capsys.readouterr().err
    assert ctl("set", "wbe", "--weight=300") == 1
    assert "there is no pool wbe" in capsys.readouterr().err
    assert ctl("set", "web", "--cap=6M") == 0
    assert capsys.readouterr().err.endswith("there is no pool web now: what was set holds when it comes\n")
    assert ctl("start", "web") == 0
    found = answer(capsys, "show", "web")
    assert (found["weight"], found["cap"], found["minimum"]) == (300, 6 << 20, 1 << 20)
    assert found["target_bytes"] <= 6 << 20


BACKINGS = ("", "srv", "srv/file")


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_device_is_resized_with_its_pages(host: Place, capsys: Output, backing: str) -> None:
    assert ctl("create", "web", "--size=8M", "--weight=300", *elsewhere(host, backing)) == 0
    write(host, "web", 3)
    write(host, "web", 2047)
    assert ctl("resize", "web", "80M") == 0
    with client(host, "web") as handle:
        assert handle.get_size() == 80 << 20
    assert is_written(host, "web", 3)
    assert is_written(host, "web", 2047)
    write(host, "web", 20479)
    assert ctl("resize", "web", "40M") == 1
    assert "holds pages beyond 40.0M" in capsys.readouterr().err
    assert is_written(host, "web", 20479), "it is served as before"
    trim(host, "web", 20479)
    assert ctl("stop", "web") == ctl("resize", "web", "40M") == 0
    assert states(host) == {"web": "stopped"}
    assert ctl("start", "web") == 0
    assert is_written(host, "web", 2047)
    found = answer(capsys, "show", "web")
    assert (found["size"], found["weight"]) == (40 << 20, 300)


def elsewhere(host: Place, backing: str) -> list[str]:
    return [f"--backing={host.root}/{backing}"] if backing else []


def trim(host: Place, name: str, page: int) -> None:
    with client(host, name) as handle:
        handle.trim(PAGE, page * PAGE)


def test_what_has_no_file_is_resized_when_it_is_empty(host: Place, capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M", "--backing=none") == 0
    write(host, "web", 3)
    assert ctl("resize", "web", "16M") == 1
    assert "has no file for its pages" in capsys.readouterr().err
    assert is_written(host, "web", 3)
    trim(host, "web", 3)
    assert ctl("resize", "web", "16M") == 0
    assert answer(capsys, "show", "web")["size"] == 16 << 20


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_device_is_renamed_with_its_pages(host: Place, capsys: Output, backing: str) -> None:
    settings = "--weight=300", "--cap=7M", "--minimum=1M", "--vhost"
    assert ctl("create", "web", "--size=8M", *settings, *elsewhere(host, backing)) == 0
    assert ctl("create", "db", "--size=8M") == 0
    write(host, "web", 3)
    assert ctl("rename", "web", "db") == 1
    assert "device db is there already" in capsys.readouterr().err
    with client(host, "web"):
        assert ctl("rename", "web", "new") == 1
        assert "has a client" in capsys.readouterr().err
    assert ctl("rename", "web", "new") == 0
    assert states(host) == {"db": "running", "new": "running"}
    assert is_written(host, "new", 3)
    found = answer(capsys, "show", "new")
    assert (found["weight"], found["cap"], found["minimum"]) == (300, 7 << 20, 1 << 20)
    assert not [path for path in left(host) if "web" in path and path != f"srv/{backing}"]
    assert bytes(Disk(host.vhost("new")).pread(PAGE, 3 * PAGE)) == content(3, 1)


RESIZE = (
    "processes.Processes.stop", "devices.Client.destroy", "resizing._extend", "resizing._rewrite", "resizing.resize",
    "definition.save", "processes.Processes.start",
)  # fmt: skip
RENAME = (
    "processes.Processes.stop", "devices.Client.destroy", "processes.Processes.uninstall", "files.move",
    "accounts.rename", "devices.Client.rename", "definition.save", "processes.Processes.install",
    "definition.sync_directory", "processes.Processes.start",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", RESIZE)
def test_resize_goes_on_where_it_was_killed(host: Place, capsys: Output, step: str, moment: str) -> None:
    assert ctl("create", "web", "--size=8M", "--weight=300") == 0
    write(host, "web", 3)
    killed_at(step, moment, "resize", "web", "16M")
    assert ctl("resize", "web", "16M") == ctl("start", "web") == 0
    assert is_written(host, "web", 3)
    found = answer(capsys, "show", "web")
    assert (found["size"], found["weight"]) == (16 << 20, 300)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", RESIZE[:-1])
def test_resize_that_fails_leaves_it_served_as_before(
    host: Place, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    assert ctl("create", "web", "--size=8M") == 0
    write(host, "web", 3)
    with monkeypatch.context() as patch:
        fail_at(patch, step, moment)
        assert ctl("resize", "web", "16M") == 1
    assert is_written(host, "web", 3)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", RENAME)
def test_rename_goes_on_where_it_was_killed(host: Place, capsys: Output, step: str, moment: str) -> None:
    assert ctl("create", "web", "--size=8M", "--weight=300") == 0
    write(host, "web", 3)
    killed_at(step, moment, "rename", "web", "new")
    if "web" in states(host):
        assert ctl("rename", "web", "new") == 0
    assert ctl("start", "new") == 0
    assert is_written(host, "new", 3)
    assert answer(capsys, "show", "new")["weight"] == 300
    assert states(host) == {"new": "running"}


# With a systemd that is none: what is asked of it, and that it fails. tests/vm/test_systemd.py has a real one.
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>{log}
[ $(wc -l <{log}) != {fails} ] || {{ echo "call {fails} fails" >&2; exit 1; }}
[ "$1" != show ] || printf 'ActiveState=activating\\nSubState=auto-restart\\n'
"""
JOURNAL = "#!/bin/sh\necho nbdkit: tmem: error: no luck\n"
CALLS = [
    "daemon-reload",
    "enable --quiet tmemd-device@web.service",
    "start tmemd-device@web.socket tmemd-device@web.service",
    "show --property=ActiveState,SubState tmemd-device@web.service",
]
UNDONE = [
    "disable --quiet --now tmemd-device@web.service tmemd-device@web.socket",
    "reset-failed tmemd-device@web.service tmemd-device@web.socket",
]


@pytest.fixture
def systemd(host: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Have systemd, whose call of that number fails; returns where calls are noted."""
    booted = host.below("run/systemd/system")
    booted.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def fails(number: int) -> Path:
        log = tmp_path / "log"
        for name, script in (("systemctl", SYSTEMCTL.format(log=log, fails=number)), ("journalctl", JOURNAL)):
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
        return log

    yield fails
    booted.rmdir()


@pytest.mark.parametrize("fails", range(len(CALLS) + 1))
def test_what_systemd_does_not_do_is_undone(
    host: Place, capsys: Output, systemd: Callable[[int], Path], fails: int
) -> None:
    before, log = left(host), systemd(fails)
    assert ctl("create", "web", "--size=8M", f"--backing={host.root}/srv") == 1
    reason = f"call {fails} fails" if fails else "web does not start: no luck"
    assert capsys.readouterr().err.startswith(f"tmemctl: {reason}")
    assert log.read_text().splitlines() == [*CALLS[: fails or None], *UNDONE, "daemon-reload"]
    assert left(host) == before


def test_what_cannot_be_undone_is_said_and_taken_away_later(
    host: Place, capsys: Output, systemd: Callable[[int], Path]
) -> None:
    systemd(len(CALLS) + 1)
    assert ctl("create", "web", "--size=8M") == 1
    said = capsys.readouterr().err
    assert "web does not start: no luck" in said
    assert "there still (call 5 fails): 'tmemctl remove web' takes it away" in said
    assert states(host) == {"web": "unfinished"}
    assert ctl("remove", "web") == 0
    assert states(host) == {}


def test_who_was_started_by_hand_is_not_taken_for_ours(host: Place, capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M") == ctl("stop", "web") == 0
    with host.pool("web").open("rb+") as by_hand:
        assert poolfile.lock(by_hand.fileno())
        for command in ("start", "restart"):
            assert ctl(command, "web") == 1
            assert "is served by a process that somebody started by hand" in capsys.readouterr().err
    assert ctl("start", "web") == 0


@pytest.mark.parametrize("through", [False, True])
def test_a_source_stays_and_is_whose_it_was(host: Place, through: bool) -> None:
    image = host.below("srv/image")
    image.write_bytes(content(3, 1) * 64)
    os.chown(image, 12345, 0)
    options = ["-o", "write=through"] if through else []
    for leaves_it in ("remove", "failure"):
        failing = ["-o", "no=thing"] if leaves_it == "failure" else []
        assert ctl("create", "golden", f"--source={image}", *options, *failing) == (1 if failing else 0)
        if not failing:
            assert image.stat().st_uid == (host.home("golden").stat().st_uid if through else 12345)
            assert is_written(host, "golden", 0) is False
            assert ctl("remove", "golden") == 0
        assert image.read_bytes() == content(3, 1) * 64
        assert image.stat().st_uid == 12345


def test_a_source_in_the_devices_own_directory_stays(host: Place) -> None:
    assert ctl("create", "golden", "--size=8M") == ctl("remove", "golden") == 0
    host.home("golden").mkdir()
    image = host.home("golden") / "image"
    image.write_bytes(bytes(1 << 20))
    host.definition("golden").write_text(f"SOURCE={image}\n")
    assert ctl("remove", "golden") == 0
    assert image.exists()


def test_resize_mends_a_size_that_was_edited(host: Place, capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M") == 0
    write(host, "web", 2047)
    path = host.definition("web")
    path.write_text(path.read_text().replace("SIZE=8M", "SIZE=4M"))
    assert ctl("restart", "web") == 1
    assert "the bitmap is of a device of 8388608 bytes" in capsys.readouterr().err
    assert ctl("resize", "web", "4M") == 1
    assert "holds pages beyond 4.00M" in capsys.readouterr().err
    assert ctl("resize", "web", "16M") == 0
    assert is_written(host, "web", 2047)


REFUSED = (
    (["Web", "--size=8M"], "'Web' is no name for a device"),
    (["a" * 26, "--size=8M"], "is no name for a device"),
    (["web", "--size=8M", "-o", "size=4M"], "size= is not for further options"),
    (["web", "--size=8M", "-o", "lost=$(x)"], "is no KEY=VALUE"),
    (["web", "--size=8M", "-o", "no=thing"], "web does not start: unknown key no="),
    (["web", "--size=100"], "web does not start: web: size=100 is not a positive multiple of 512"),
    (["web", "--size=15T"], "has no room for 15.0T"),
    (["web", "--size=8M", "--backing={root}/nowhere/file"], "/nowhere: no such directory"),
    (["web", "--size=8M", "--backing={root}/srv/full"], "/srv/full holds something"),
    (["web", "--size=8M", "--backing=/dev/null"], "/dev/null is neither a file, a directory nor a disk"),
    (["web", "--size=8M", "--backing={root}/var/lib/tmemd-devices/db/backing"], "is already device db's"),
    (["web", "--source={root}/var/lib/tmemd-devices/db/backing"], "is already device db's"),
    (["web", "--source={root}/srv/none"], "/srv/none: No such file or directory"),
    (["web", "--source={root}/srv"], "/srv is neither an image nor a disk"),
    (["web", "--source={root}/srv/secret"], "tmemd-web, of the group tmemd, may not read it: chgrp tmemd"),
    (["web", "--source={root}/srv/full", "-o", "lost=zero"], "web does not start: web: backing="),
    (["web", "--size=8M", "--cap=1"], "a cap of 1 bytes (1) is below its least"),
    (["web", "--size=8M", "--minimum=1T"], "a minimum of"),
    (["stray", "--size=8M"], "there is a pool stray, of no device that is defined"),
    (["web", "--size=8M", "-o", "bitmap={root}/srv/full"], "/srv/full is there already"),
    (["web", "--size=8M", "--backing={root}/srv/used"], "/srv/used/web holds the files of another device"),
    (["left", "--size=8M"], "holds the files of another device of that name"),
    (["db", "--size=8M"], "device db is there already"),
)


def test_what_cannot_be_is_refused_and_leaves_nothing(host: Place, capsys: Output) -> None:
    assert ctl("create", "db", "--size=8M") == 0
    for name, mode in (("full", 0o644), ("secret", 0o600)):
        host.below(f"srv/{name}").write_bytes(bytes(4096))
        host.below(f"srv/{name}").chmod(mode)
    with fakes.pool(host.pools, "stray"):
        pass
    host.below("srv/used/web").mkdir(parents=True)
    host.below("srv/used/web/file").touch()
    host.home("left").mkdir()
    (host.home("left") / "backing").touch()
    before = left(host)
    for command, error in REFUSED:
        capsys.readouterr()
        assert ctl("create", *(word.format(root=host.root) for word in command)) == 1
        assert error in capsys.readouterr().err
        assert left(host) == before
    assert states(host) == {"db": "running"}


@pytest.mark.usefixtures("host")
def test_devices_are_made_at_the_same_time() -> None:
    names = ("one", "two", "three")
    command = [sys.executable, "-m", "tmemd.cli", "create", "--size=8M"]
    processes = [subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.DEVNULL) for name in names]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_ctrl_c_leaves_nothing(host: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = left(host)
    with monkeypatch.context() as patch:
        fail_at(patch, "devices.Devices._await", "after", KeyboardInterrupt())
        assert ctl("create", "web", "--size=8M") == 130
    assert left(host) == before


@pytest.mark.usefixtures("host")
def test_others_than_root_are_told() -> None:
    command = [sys.executable, "-P", "-m", "tmemd.cli", "stop", "web"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, user=65534, group=65534, extra_groups=[], cwd="/"
    )
    assert done.returncode == 1
    assert done.stderr == "tmemctl: devices are made and looked after by root: run this as root\n"


def test_list_shows_what_is_defined_and_how_it_is(host: Place, capsys: Output) -> None:
    for name in ("broken", "stopped", "web", "without"):
        assert ctl("create", name, "--size=8M") == 0
    killed_at("definition.save", "after", "create", "half", "--size=8M")
    kill_server(host, "broken")
    assert ctl("stop", "stopped") == ctl("stop", "without") == ctl("destroy", "without") == 0
    found = answer(capsys, "list")
    assert {each["name"]: each["state"] for each in found} == {
        "broken": "failed", "half": "unfinished", "stopped": "stopped", "web": "served", "without": "stopped",
    }  # fmt: skip
    assert {each["name"]: each["service"] for each in found}["web"] == "running"
    assert {each["size_bytes"] for each in found} == {8 << 20}
    assert ctl("list", "without") == 0
    assert str(host.home("without")) in capsys.readouterr().out


def test_without_a_tmemd_a_device_is_started_but_none_is_made(host: Place, capsys: Output) -> None:
    assert ctl("create", "web", "--size=8M") == ctl("stop", "web") == 0
    host.tmemd.rename(host.tmemd.with_name("away"))
    try:
        assert ctl("create", "db", "--size=8M") == 1
        assert "no tmemd listens at" in capsys.readouterr().err
        assert ctl("start", "web") == 0
        write(host, "web", 3)
    finally:
        host.tmemd.with_name("away").rename(host.tmemd)
    assert states(host) == {"web": "running"}


@pytest.mark.parametrize("own_bitmap", [False, True])
def test_a_disk_is_its_users_while_it_is_a_device(
    host: Place, capsys: Output, loop_device: Path, own_bitmap: bool
) -> None:
    owner = loop_device.stat().st_uid
    options = ["-o", f"bitmap={host.home('web')}/map"] if own_bitmap else []
    assert ctl("create", "web", "--size=1M", f"--backing={loop_device}", *options) == 0
    assert loop_device.stat().st_uid == host.home("web").stat().st_uid
    write(host, "web", 3)
    assert ctl("restart", "web") == 0
    assert is_written(host, "web", 3)
    assert ctl("resize", "web", "1536K") == (0 if own_bitmap else 1)
    assert ctl("rename", "web", "new") == (0 if own_bitmap else 1)
    name = "new" if own_bitmap else "web"
    assert is_written(host, name, 3)
    if not own_bitmap:
        assert "knows device web by name and size" in capsys.readouterr().err
    assert ctl("remove", name) == 1
    assert ctl("remove", name, "--force") == 0
    assert loop_device.stat().st_uid == owner
