# SPDX-License-Identifier: BSD-3-Clause
"""The life of a device in commands, where there is no systemd: each step, and a fault or a SIGKILL at each."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.content import PAGE, content
from tests.support.devicehost import GID, devicehost, is_written, kill_server, left, states, write
from tests.support.harness import ROOT, connect
from tests.support.vhost.disk import Disk
from tmemd.cli import main
from tmemd.definitions.place import Place
from tmemd.store.poolfile import PoolError

Output = pytest.CaptureFixture[str]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices are made by root")


@pytest.fixture
def host() -> Iterator[Place]:
    with devicehost() as place:
        yield place


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
    handle = connect(host.socket("web"), "web")
    assert ctl("remove", "web") == 1
    assert "has a client" in capsys.readouterr().err
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


def fail_at(patch: pytest.MonkeyPatch, step: str, moment: str) -> None:
    """Have the first call of a function fail, before or after it has done its work."""
    where, name = step.rsplit(".", 1)
    owner = pkgutil.resolve_name(f"tmemd.definitions.{where}")
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> None:
        patch.undo()
        if moment == "after":
            original(*arguments, **options)
        raise PoolError("the fault")

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


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", REMOVE)
def test_remove_goes_on_where_it_was_killed(host: Place, step: str, moment: str) -> None:
    before = left(host)
    assert ctl("create", "web", "--size=8M") == 0
    killed_at(step, moment, "remove", "web")
    if states(host):
        assert ctl("remove", "web") == 0
    assert left(host) == before
