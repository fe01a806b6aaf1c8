# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import fakes
from tests.support.harness import DEADLINE, wait_until, waiting
from tests.support.plugin import Plugin
from tmemd import protocol, version
from tmemd.cli import common, main, work
from tmemd.cli.commands import COMMANDS
from tmemd.cli.common import SCHEMA
from tmemd.client import Client, UnreachableError
from tmemd.daemon import metrics, start
from tmemd.operations import perform
from tmemd.protocol import HostStatus
from tmemd.store import poolfile, requests
from tmemd.store.directory import Pools
from tmemd.store.requests import ANY_PAGE, Choice, Queued, Request

MIB = fakes.MIB
Output = pytest.CaptureFixture[str]


def ctl(directory: Path, *command: str) -> int:
    return main([*command, f"--pools={directory}"])


def parsed(output: Output) -> Any:
    return json.loads(output.readouterr().out)


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_every_command_explains_itself(command: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: tmemctl" in capsys.readouterr().out


def test_without_a_command_there_is_help(capsys: Output) -> None:
    for nothing in ([], ["--json"]):
        assert main(nothing) == 0
        assert "usage: tmemctl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["lits"], "there is no command 'lits'; did you mean 'list'?"),
        (["--json", "drian", "web"], "there is no command 'drian'; did you mean 'drain'?"),
        (["xyzzy"], "there is no command 'xyzzy'"),
        (["demote", "web", "1M", "--idel=3"], "unrecognized arguments: --idel=3; did you mean '--idle'?"),
        (["show", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_what_is_mistyped_is_a_usage_error_that_says_what_was_meant(
    words: list[str], meant: str, capsys: Output
) -> None:
    with pytest.raises(SystemExit) as usage:
        main(words)
    assert usage.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {meant}\n")


@pytest.mark.parametrize("words", [["--json", "list"], ["list", "--json"], ["--json", "list", "--json"]])
def test_json_is_said_before_the_command_or_behind_it(directory: Path, words: list[str], capsys: Output) -> None:
    assert ctl(directory, *words) == 0
    assert parsed(capsys) == []


def test_list_prints_an_array_with_the_names_scripts_rely_on(directory: Path, capsys: Output) -> None:
    assert ctl(directory, "list", "--json") == 0
    assert parsed(capsys) == []
    with fakes.pool(directory, "b", pages_in_tmem=3), fakes.pool(directory, "a", pages_in_file=4):
        assert ctl(directory, "list", "--json") == 0
        one, other = parsed(capsys)
    assert (one["name"], one["pages_in_file"], other["name"], other["pages_in_tmem"]) == ("a", 4, "b", 3)
    assert (one["size"], one["target_bytes"], one["pid"]) == (64 * MIB, fakes.LIMIT, None)
    for field in ("used_bytes", "puts", "puts_refused", "gets", "invalidates"):
        assert one[field] == 0


def test_list_prints_a_table(directory: Path, capsys: Output) -> None:
    (directory / "bad.pool").write_bytes(b"x" * 9999)
    with fakes.pool(directory, "web", used_bytes=3 * MIB) as fd:
        poolfile.write_frozen(fd, True)
        assert ctl(directory, "list") == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == [
        "NAME", "STATE", "KIND", "SIZE", "TARGET", "USED", "TMEM", "FILE", "DOOR", "CLIENTS", "BACKING",
    ]  # fmt: skip
    assert lines[1].split()[:2] == ["bad", "damaged"]
    assert lines[2].split() == ["web", "idle,", "frozen", "persistent", "64.0M", "256M", "3.00M", *"00-0-"]
    assert "not a tmem pool" in output.err


def test_names_are_never_cut_off(directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    names = ["a" * 62 + end for end in "12"]
    with fakes.pool(directory, names[0]), fakes.pool(directory, names[1]):
        for command in (["list"], ["list", "--long"], ["freeable"]):
            assert ctl(directory, *command) == 0
            shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("aaa")]
            assert set(shown) == set(names)


def test_a_name_given_twice_counts_once(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web"):
        assert ctl(directory, "freeable", "web", "web", "--json") == 0
        assert len(parsed(capsys)["pools"]) == 1


def test_show_prints_every_field(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", puts=17):
        assert ctl(directory, "show", "web", "--json") == 0
        assert parsed(capsys)["puts"] == 17
        assert ctl(directory, "show", "web") == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "size" not in shown, "an old name"
    assert (shown["puts"], shown["size_bytes"], shown["pid"]) == ("17", f"{64 * MIB} (64.0M)", "-")


def test_changes_are_silent_or_json(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web"):
        assert ctl(directory, "set", "web", "--target=100M") == 0
        assert ctl(directory, "freeze", "web") == 0
        assert capsys.readouterr().out == ""
        assert ctl(directory, "set", "web", "--target=200M", "--json") == 0
        status = parsed(capsys)
        assert (status["target_bytes"], status["frozen"]) == (200 * MIB, True)
        assert ctl(directory, "thaw", "web", "--json") == 0
        assert parsed(capsys)["frozen"] is False


@pytest.mark.parametrize("target", ["1K", "257M"])
def test_targets_out_of_bounds_change_nothing(directory: Path, target: str, capsys: Output) -> None:
    with fakes.pool(directory, "web") as fd:
        assert ctl(directory, "set", "web", f"--target={target}") == 1
        assert poolfile.read_control(fd).target is None
    assert "outside 1048576 to 268435456 bytes (1.00M to 256M)" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["9999999T", "-1", "much", ""])
def test_targets_that_are_no_sizes_are_usage_errors(directory: Path, target: str) -> None:
    with pytest.raises(SystemExit) as usage:
        ctl(directory, "set", "web", f"--target={target}")
    assert usage.value.code == 2


@pytest.mark.parametrize("name", ["../web", "/etc/passwd", "", ".", "web\n", "nothing"])
@pytest.mark.parametrize("command", ["show", "map", "freeze", "drain", "compact", "flush", "destroy"])
def test_bad_names_are_one_clear_line(directory: Path, command: str, name: str, capsys: Output) -> None:
    assert ctl(directory, command, name) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("tmemctl: ")


def test_map_gives_ranges_and_a_picture(directory: Path, capsys: Output) -> None:
    with fakes.filled(directory, size=4 * MIB) as filler:
        for page, word in ((0, 1), (1, 1), (2, 2), (3, 3), (600, 4)):
            filler.word(page, word)
        assert ctl(directory, "map", "web", "--json") == 0
        found = parsed(capsys)
        assert found["counts"] == {"nowhere": 1020, "tmem": 2, "file": 1, "lost": 1}
        assert found["ranges"] == [
            {"start": 0, "count": 2, "where": "tmem"},
            {"start": 2, "count": 1, "where": "file"},
            {"start": 3, "count": 597, "where": "nowhere"},
            {"start": 600, "count": 1, "where": "lost"},
            {"start": 601, "count": 423, "where": "nowhere"},
        ]
        assert ctl(directory, "map", "web") == 0
    head, *lines, legend = capsys.readouterr().out.splitlines()
    assert "1024 pages" in head
    assert [len(line) for line in lines] == [64] * 16
    assert lines[0].startswith("##-...")
    assert lines[9][600 % 64] == "!"
    assert "tmem 2" in legend


def test_destroy_wants_to_be_sure(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_in_tmem=3):
        assert ctl(directory, "destroy", "web") == 1
        assert "3 pages in tmem" in capsys.readouterr().err
        assert ctl(directory, "destroy", "web", "--yes", "--json") == 0
        assert parsed(capsys) == {"schema": SCHEMA, "destroyed": "web"}
    assert list(directory.iterdir()) == []


def test_drain_waits_for_the_plugin(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_in_tmem=105), Plugin(directory, "web", 0) as plugin:
        assert ctl(directory, "drain", "web") == 0
    assert plugin.asked == [Queued(1, Request.DRAIN, 0, ANY_PAGE)]
    assert capsys.readouterr().out == "web: drained of 105 pages, none is in tmem\n"


def test_drain_says_what_is_in_tmem_again(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_in_tmem=105), Plugin(directory, "web", 0, left=5):
        assert ctl(directory, "drain", "web") == 0
    assert capsys.readouterr().out == "web: drained, but not frozen: its guest has put 5 pages in tmem again\n"


def test_a_frozen_pool_with_pages_in_tmem_is_not_called_drained(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_in_tmem=105) as fd, Plugin(directory, "web", 0, left=5):
        poolfile.write_frozen(fd, True)
        assert ctl(directory, "drain", "web") == 1
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "tmemctl: pool web was not drained: 5 pages are in tmem still\n")


def test_a_waiter_hears_its_own_answer_not_that_of_one_who_left(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web") as fd:
        left = requests.ask(fd, Request.DRAIN)  # by somebody who does not wait for it
        with Plugin(directory, "web", 0) as plugin:
            assert ctl(directory, "compact", "web") == 0
        assert [(request.number, request.op) for request in plugin.asked] == [(1, Request.DRAIN), (2, Request.COMPACT)]
        assert requests.answer_to(fd, left) == 0
    assert "given back" in capsys.readouterr().out


def test_the_old_name_of_compact_still_works(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web"), Plugin(directory, "web", 0) as plugin:
        assert ctl(directory, "settle", "web", "--json") == 0
        assert Client.of_directory(directory).ask("web", "settle") == 2, "as a tmemctl of the last release asks"
    assert {request.op for request in plugin.asked} == {Request.COMPACT}
    output = capsys.readouterr()
    assert json.loads(output.out)["name"] == "web"
    assert output.err == "tmemctl: settle is called compact now; the old name goes with the next release\n"


def test_demote_hands_on_its_size_and_the_plugins_error(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web"), Plugin(directory, "web", 28) as plugin:
        assert ctl(directory, "demote", "web", "3M") == 1
    assert plugin.asked == [Queued(1, Request.DEMOTE, 3 * MIB, ANY_PAGE)]
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EAGAIN])
def test_what_a_far_server_explains_is_to_be_tried_again(directory: Path, capsys: Output, error: int) -> None:
    for command in "drain", "handover":
        with fakes.pool(directory, "web"), Plugin(directory, "web", error):
            assert ctl(directory, command, "web") == common.AWAY
        assert f"{command} of web failed: the server that has its file " in capsys.readouterr().err


def test_waiting_goes_on_while_tmemd_is_away(directory: Path) -> None:
    pools, asked = Pools(directory), list[protocol.Request]()

    def transport(request: protocol.Request) -> protocol.Answer:
        asked.append(request)
        if isinstance(request, protocol.Show) and len(asked) in (2, 3):
            raise UnreachableError("tmemd hung up")
        return perform(pools, request)

    with fakes.pool(directory, "web"), Plugin(directory, "web", 0):
        assert work.do(Client(transport), "web", "compact").answer == 0
    assert len(asked) >= 4


def test_a_plugin_that_stays_away_ends_the_waiting(
    directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_PATIENCE", 0.0)
    with fakes.pool(directory, "web"), Plugin(directory, "web", None):
        assert ctl(directory, "compact", "web") == 1
    assert "went away before it could compact it: the next one will" in capsys.readouterr().err


def test_waiting_goes_on_while_the_plugin_is_restarted(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        with Plugin(directory, "web", None) as first, ThreadPoolExecutor(1) as pool:
            done = pool.submit(work.do, client, "web", "compact")
            first.join()
            with Plugin(directory, "web", 0) as second:
                assert done.result().answer == 0
        assert second.asked == first.asked
        assert waiting(fd) == []


def test_ctrl_c_ends_only_the_waiting(directory: Path) -> None:
    with fakes.pool(directory, "web") as fd:
        assert poolfile.lock(fd)
        command = [sys.executable, "-m", "tmemd.cli", "drain", "web", f"--pools={directory}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda: waiting(fd) != [], "the request")
                process.send_signal(signal.SIGINT)
                assert process.wait(DEADLINE) == 130
                assert process.stderr
                assert process.stderr.read() == ""
                assert [request.op for request in waiting(fd)] == [Request.DRAIN]
            finally:
                process.kill()


def test_a_pool_without_a_file_cannot_be_drained(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "ram", has_file=False):
        assert ctl(directory, "drain", "ram") == 1
    assert "no backing file" in capsys.readouterr().err


def test_an_ephemeral_pool_says_so_and_where_its_pages_are_from(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "golden", ephemeral=True, puts=100_000), fakes.pool(directory, "web"):
        assert ctl(directory, "list", "--json") == 0
        golden, web = parsed(capsys)
        assert (golden["kind"], golden["source"], golden["backing"]) == ("ephemeral", "/images/golden", "")
        assert (web["kind"], web["source"]) == ("persistent", "")
        assert ctl(directory, "list") == 0
        output = capsys.readouterr()
        assert [line.split()[2] for line in output.out.splitlines()] == ["KIND", "ephemeral", "persistent"]
        assert output.out.splitlines()[1].endswith("/images/golden")
        assert output.err == "", "its guest has nothing to trim"
        assert ctl(directory, "map", "golden") == 0
        assert "source" in capsys.readouterr().out


def test_flush_asks_the_plugin(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "golden", ephemeral=True, used_bytes=MIB), Plugin(directory, "golden", 0) as plugin:
        assert ctl(directory, "flush", "golden") == 0
    assert [request.op for request in plugin.asked] == [Request.FLUSH]
    assert capsys.readouterr().out == "golden: 1.00M given back, 0 in use\n"


def test_flush_of_what_nobody_serves_forgets_the_pages(directory: Path, capsys: Output) -> None:
    with fakes.filled(directory, "golden", ephemeral=True) as filler:
        filler.put(5, b"x" * 4096)
        filler.finish()
        poolfile.write_frozen(filler.fd, True)
        assert ctl(directory, "flush", "golden", "--json") == 0
        found = parsed(capsys)
        assert (found["pages_in_tmem"], found["pages_in_file"], found["payload_bytes"]) == (0, 16384, 0)
        assert found["used_bytes"] == found["taken_bytes"] < 64 << 10
        assert found["frozen"], "what was set stays"
        assert ctl(directory, "map", "golden", "--json") == 0
        assert parsed(capsys)["counts"]["file"] == 16384
        assert ctl(directory, "check", "golden", "--strict") == 0
        assert not poolfile.is_locked(filler.fd)


def test_a_persistent_pool_is_not_flushed_nor_an_ephemeral_one_drained(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_in_tmem=3), fakes.pool(directory, "golden", ephemeral=True):
        assert ctl(directory, "flush", "web") == 1
        assert "pool web is persistent" in capsys.readouterr().err
        assert ctl(directory, "drain", "golden") == 1
        assert "'tmemctl flush' empties it" in capsys.readouterr().err


def test_destroying_an_ephemeral_pool_loses_nothing(directory: Path) -> None:
    with fakes.pool(directory, "golden", ephemeral=True, pages_in_tmem=3):
        assert ctl(directory, "destroy", "golden") == 0
    assert list(directory.iterdir()) == []


def test_no_tmemd_is_a_clear_error(directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMEMD_SOCKET", f"{directory}/nobody")
    assert main(["list"]) == 1
    reason = "No such file or directory: is it running? (--pools DIR works without)"
    assert capsys.readouterr().err == f"tmemctl: tmemd ({directory}/nobody): {reason}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_ask_is_told_who_may(directory: Path) -> None:
    with fakes.tmemd(directory) as running:
        directory.chmod(0o755)
        command = [sys.executable, "-P", "-m", "tmemd.cli", "list", f"--socket={running.socket}"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, user=65534, group=65534, extra_groups=[], cwd="/"
        )
    assert done.returncode == 1
    assert done.stderr.endswith(
        "Permission denied: only root, tmemd's own user and its group (access.group) may ask it\n"
    )


@pytest.mark.parametrize("loaded", ["argparse", "msgspec", "rich"])
def test_ctrl_c_while_it_starts_is_no_traceback(tmp_path: Path, loaded: str) -> None:
    (tmp_path / f"{loaded}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tmemd.cli", "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_socket_is_found_by_option_and_environment(
    directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fakes.tmemd(directory) as running, fakes.pool(running.directory, "web") as fd:
        assert main(["freeze", "web", f"--socket={running.socket}"]) == 0
        assert poolfile.read_control(fd).frozen
        monkeypatch.setenv("TMEMD_SOCKET", str(running.socket))
        assert main(["thaw", "web", "--json"]) == 0
        assert parsed(capsys)["frozen"] is False
        assert ctl(running.directory, "freeze", "web") == 1
        assert "controls the pools in" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback(directory: Path) -> None:
    command = f"{sys.executable} -m tmemd.cli list --json --pools={directory} | true"
    for i in range(50):
        with fakes.pool(directory, f"p{i}", size=MIB):
            pass
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""


def test_output_that_cannot_be_written_is_no_traceback(directory: Path) -> None:
    command = [sys.executable, "-m", "tmemd.cli", "list", "--json", f"--pools={directory}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "tmemctl: No space left on device\n")


# With a tmemd: settings, the host, and what follows from them.


@pytest.fixture
def tmemd(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fakes.Tmemd]:
    with fakes.tmemd(directory) as running:
        monkeypatch.setenv("TMEMD_SOCKET", str(running.socket))
        yield running


def test_several_settings_are_set_at_once_and_taken_back(tmemd: fakes.Tmemd, capsys: Output) -> None:
    def settings(*options: str) -> tuple[Any, ...]:
        assert main(["set", "web", *options, "--json"]) == 0
        found = parsed(capsys)
        return tuple(found[key] for key in ("weight", "cap", "minimum", "compression", "target"))

    with fakes.pool(tmemd.directory, "web") as fd:
        everything = ("--weight=200", "--cap=100M", "--minimum=2M", "--compression=off", "--target=50M")
        assert settings(*everything) == (200, 100 * MIB, 2 * MIB, False, 50 * MIB)
        assert poolfile.read_control(fd).target == 50 * MIB
        assert not poolfile.read_control(fd).compression
        assert settings("--cap=none", "--target=auto") == (200, None, 2 * MIB, False, None)
        defaults = ("--weight=default", "--minimum=default", "--compression=default", "--cap=default")
        assert settings(*defaults) == (100, None, 0, True, None)


def test_what_was_set_gives_way_to_the_configuration_where_it_is_forgotten(
    directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "config").write_text('[pools.web]\nweight = 7\ncap = "9M"\n')
    with fakes.tmemd(directory, f"--config={directory}/config") as running, fakes.pool(running.directory, "web"):
        monkeypatch.setenv("TMEMD_SOCKET", str(running.socket))
        for option, weight in (("--weight=8", 8), ("--cap=none", 8), ("--weight=default", 7)):
            assert main(["set", "web", option, "--json"]) == 0
            found = parsed(capsys)
            assert found["weight"] == weight
        assert found["cap"] is None
        assert main(["set", "web", "--cap=default", "--json"]) == 0
        assert parsed(capsys)["cap"] == 9 * MIB


def test_of_several_settings_a_wrong_one_keeps_all_from_being_set(tmemd: fakes.Tmemd, capsys: Output) -> None:
    with fakes.pool(tmemd.directory, "web"):
        assert main(["set", "web", "--weight=200", "--minimum=1G"]) == 1
        assert "a minimum of 1073741824 bytes (1.00G) is above its limit" in capsys.readouterr().err
        assert tmemd.client.pool("web").settings.weight == 100


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "nothing to set: say one of --weight, --cap, "),
        (["--weight=0"], "'0' is not 1 to 10000"),
        (["--weight=1e3"], "'1e3' is not 1 to 10000"),
        (["--cap=much"], "'much' is not a size"),
        (["--minimum=none"], "'none' is not a size"),
        (["--compression=yes"], "'yes' is neither on nor off"),
        (["--target=default"], "'default' is not a size"),
    ],
)
def test_settings_that_are_none_are_usage_errors(
    directory: Path, options: list[str], error: str, capsys: Output
) -> None:
    with pytest.raises(SystemExit) as usage:
        ctl(directory, "set", "web", *options)
    assert usage.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--weight=5", "--cap=5M", "--cap=none", "--minimum=5M", "--weight=default"])
def test_settings_that_need_a_tmemd_say_so_and_what_to_do(directory: Path, option: str, capsys: Output) -> None:
    with fakes.pool(directory, "web") as fd:
        assert ctl(directory, "set", "web", option, "--target=100M", "--compression=off") == 1
        error = capsys.readouterr().err
        assert (option[2:].partition("=")[0] in error, "set a --target" in error) == (True, True)
        assert (poolfile.read_control(fd).target, poolfile.read_control(fd).compression) == (None, True)


def test_without_a_tmemd_auto_is_the_limit_that_was_given(directory: Path, capsys: Output) -> None:
    def target(*options: str) -> int:
        assert ctl(directory, "set", "web", *options, "--json") == 0
        found: int = parsed(capsys)["target_bytes"]
        return found

    with fakes.pool(directory, "web") as fd:
        assert target("--target=100M") == 100 * MIB
        assert target("--target=auto", "--compression=off") == fakes.LIMIT
        fakes.write_counters(fd, fakes.counters(limit_bytes=2 * fakes.LIMIT))
        assert target("--compression=default") == 2 * fakes.LIMIT, "served anew, with another limit"
        assert poolfile.read_control(fd).compression


def test_all_pools_are_frozen_and_thawed(tmemd: fakes.Tmemd, capsys: Output) -> None:
    with fakes.pool(tmemd.directory, "a"), fakes.pool(tmemd.directory, "b"):
        for command, frozen in (("freeze", True), ("thaw", False)):
            assert main([command, "--all", "--json"]) == 0
            assert [(pool["name"], pool["frozen"]) for pool in parsed(capsys)] == [("a", frozen), ("b", frozen)]


@pytest.mark.parametrize("which", [[], ["web", "--all"]])
def test_freeze_wants_one_pool_or_all(directory: Path, which: list[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        ctl(directory, "freeze", *which)
    assert usage.value.code == 2


def test_without_a_tmemd_all_pools_are_frozen_too(directory: Path) -> None:
    with fakes.pool(directory, "a") as a, fakes.pool(directory, "b") as b:
        assert ctl(directory, "freeze", "--all") == 0
        assert [poolfile.read_control(fd).frozen for fd in (a, b)] == [True, True]


def publish(fd: int, stored: dict[int, int], raw: dict[int, int]) -> None:
    """Published ages: these bytes."""
    tables = [[0] * poolfile.GENERATIONS for _ in range(6)]
    for table, found in ((tables[3], stored), (tables[4], raw)):
        for age, nbytes in found.items():
            table[age] = nbytes
    gets, file_reads, freed, stored_bytes, raw_bytes, in_file = map(tuple, tables)
    fakes.write_ages(fd, poolfile.Ages(gets, file_reads, freed, stored_bytes, raw_bytes, in_file, 1))


def used_pool(directory: Path, **values: int) -> Any:
    """A pool with something in it: 10 MiB used, of which 2 idle and 1 incompressible."""
    values = {
        "used_bytes": 10 * MIB,
        "pages_in_tmem": 4096,
        "payload_bytes": 8 * MIB,
        "gets": 3,
        "file_reads": 1,
    } | values
    return fakes.pool(directory, "web", has_file=True, ephemeral=False, **values)


def test_long_lists_say_settings_shares_latencies_and_ages(directory: Path, capsys: Output) -> None:
    with used_pool(directory) as fd:
        publish(fd, {0: MIB, 3: MIB, 15: 2 * MIB}, {15: MIB})
        fakes.write_latencies(fd, put=fakes.histogram(9, count=100))
        assert ctl(directory, "list", "--long", "--json") == 0
        (found,) = parsed(capsys)
        assert (found["weight"], found["hit_share"], found["compression_ratio"]) == (100, 0.75, 2.0)
        low, high = (bound * 1e-9 for bound in poolfile.LATENCY_BOUNDS_NS[8:10])
        assert low < found["put_seconds"]["median"] < found["put_seconds"]["p99"] < high
        assert found["get_seconds"] == {"median": None, "p99": None}
        assert [age["stored_bytes"] // MIB for age in found["stored_by_age"]] == [1, 1, 0, 0, 2]
        assert [age["seconds"] for age in found["stored_by_age"]] == [10, 20, 40, 75, None]
        assert len(found["latencies"]["put"]["counts"]) == poolfile.LATENCIES
        assert ctl(directory, "list", "-l") == 0
        text = capsys.readouterr().out
        for words in ("WEIGHT", "COMPRESS", "75.0%", "2.00", "median and 99th percentile", "OLDER"):
            assert words in text
        assert ctl(directory, "show", "web") == 0
        assert "put_seconds          median" in capsys.readouterr().out


def test_a_long_list_of_a_pool_nobody_knows_anything_of_is_no_error(directory: Path, capsys: Output) -> None:
    (directory / "bad.pool").write_bytes(b"x" * 9999)
    with fakes.pool(directory, "web"):
        assert ctl(directory, "list", "-l") == 0
    assert "not a tmem pool" in capsys.readouterr().err


def test_a_guest_that_never_trims_is_warned_of(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", puts=100_000), fakes.pool(directory, "tidy", puts=100_000, trims=1):
        assert ctl(directory, "show", "web") == 0
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith("tmemctl: web: its guest swaps and never says which pages are dead")
        assert ctl(directory, "show", "tidy") == 0
        assert capsys.readouterr().err == ""


def test_what_is_a_disk_is_not_said_to_swap(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "disk", puts=100_000) as fd:
        os.pwrite(fd, replace(fakes.identity("disk"), is_durable=True).pack(), 0)
        assert ctl(directory, "show", "disk") == 0
        output = capsys.readouterr()
        assert (output.err, "durable              yes" in output.out) == ("", True)


def test_list_names_what_show_warns_of_and_says_no_more(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", pages_lost=3, puts=100_000):
        assert ctl(directory, "list") == 0
        output = capsys.readouterr()
        assert (output.err, "idle, lost pages, never trims" in output.out) == ("", True)
        assert ctl(directory, "list", "--json") == 0
        (found,) = parsed(capsys)
        assert (found["state"], found["warnings"]) == ("idle", ["lost pages", "never trims", "idle"])
        assert ctl(directory, "show", "web") == 0
        assert capsys.readouterr().err.startswith("tmemctl: web: 3 pages were lost with the host")


@pytest.fixture
def three(directory: Path) -> Iterator[Path]:
    with (
        fakes.pool(directory, "a", used_bytes=2 * MIB, gets=7),
        fakes.pool(directory, "b", used_bytes=3 * MIB),
        fakes.pool(directory, "c", used_bytes=MIB),
    ):
        yield directory


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--columns=name,used"], ["NAME USED", "a 2.00M", "b 3.00M", "c 1.00M"]),
        (["--columns=used_bytes,name", "--sort=used"], ["USED NAME", "3.00M b", "2.00M a", "1.00M c"]),
        (["--columns=name", "--sort=used", "-r"], ["NAME", "c", "a", "b"]),
        (["--columns=name", "--reverse"], ["NAME", "c", "b", "a"]),
        (["--columns=name,pid,clients", "--sort=pid"], ["NAME PID CLIENTS", "a - 0", "b - 0", "c - 0"]),
        (["--columns=name", "--sort=hit-share"], ["NAME", "a", "b", "c"]),
        (["--columns=name,hit_share,put_seconds", "a"], ["NAME HIT SHARE PUT SECONDS", "a 1.000 -"]),
        (["--columns=name,used,frozen", "--bytes", "c", "a", "c"],
         ["NAME USED FROZEN", f"a {2 * MIB} no", f"c {MIB} no"]),
    ],
)  # fmt: skip
def test_list_shows_the_pools_and_columns_that_were_asked_for(
    three: Path, options: list[str], rows: list[str], capsys: Output
) -> None:
    assert ctl(three, "list", *options) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == rows


def test_list_prints_chosen_columns_as_json(three: Path, capsys: Output) -> None:
    assert ctl(three, "list", "b", "--columns=name,used", "--json") == 0
    assert parsed(capsys) == [{"schema": SCHEMA, "name": "b", "used_bytes": 3 * MIB}]
    assert ctl(three, "list", "b", "--columns=all") == 0
    assert ctl(three, "list", "bb") == 1
    assert "there is no pool bb; did you mean 'b'?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--columns=name,usde", "--sort=usde_bytes", "--columns="])
def test_columns_that_are_none_are_usage_errors(directory: Path, option: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as usage:
        ctl(directory, "list", option)
    assert usage.value.code == 2
    assert "there is no column" in capsys.readouterr().err


def test_list_watches_until_ctrl_c(three: Path) -> None:
    command = [sys.executable, "-m", "tmemd.cli", "list", "--watch", "--interval=0.1", f"--pools={three}"]
    for options, at_first in (([], "c"), (["--json"], '"name":"c"')):
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            seen = 0
            while seen < 2:
                seen += at_first in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 130


@pytest.mark.parametrize(
    ("goal", "values", "locked"),
    [
        (["--state=served"], {}, True),
        (["--state=idle"], {}, False),
        (["--state=drained"], {"pages_in_file": 3}, True),
        (["--state=thawed"], {}, True),
        (["--state=disconnected"], {}, True),
        (["--below=3M"], {"used_bytes": 2 * MIB}, True),
    ],
)
def test_what_is_so_already_is_not_waited_for(
    directory: Path, goal: list[str], values: dict[str, int], locked: bool, capsys: Output
) -> None:
    with fakes.pool(directory, "web", has_file=True, ephemeral=False, **values) as fd:
        assert not locked or poolfile.lock(fd)
        assert ctl(directory, "wait", "web", *goal, "--timeout=0", "--json") == 0
        assert parsed(capsys)["name"] == "web"


@pytest.mark.parametrize(
    "goal", ["--state=served", "--state=drained", "--state=frozen", "--state=connected", "--state=gone", "--below=2M"]
)
def test_what_is_not_so_is_124_after_the_timeout(directory: Path, goal: str, capsys: Output) -> None:
    with fakes.pool(directory, "web", used_bytes=2 * MIB, pages_in_tmem=1):
        assert ctl(directory, "wait", "web", goal, "--timeout=0.05") == 124
        assert "after 0.05 s: it is idle, and takes 2.00M" in capsys.readouterr().err


def test_a_pool_that_comes_and_goes_is_waited_for(directory: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(ctl, directory, "wait", "web", "--state=idle")
        with fakes.pool(directory, "web"):
            assert came.result(DEADLINE) == 0
        went = pool.submit(ctl, directory, "wait", "web", "--state=gone")
        (directory / "web.pool").unlink()
        assert went.result(DEADLINE) == 0


def test_a_tmemd_that_is_away_is_waited_for(directory: Path, capsys: Output) -> None:
    assert main(["wait", "web", "--state=gone", "--timeout=0.2", f"--socket={directory}/nobody"]) == 124
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("No such file or directory; waiting for it")
    assert second.endswith("it is not known, for tmemd is away")


def test_json_calls_things_as_metrics_do(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web", used_bytes=3 * MIB, regions_set=2):
        assert ctl(directory, "show", "web", "--json") == 0
    found = parsed(capsys)
    assert found["schema"] == SCHEMA
    missing = {*metrics.POOL_GAUGES, *metrics.POOL_COUNTERS, *metrics.HOST_GAUGES} - {"map_granules_set"}
    host = HostStatus(
        policy="fair", budget_bytes=1, targets_bytes=1, used_bytes=1, total_bytes=1, available_bytes=1,
        reserve_bytes=1, pressure_some=None, pressure_full=None, writes_left_bytes=None,
    )  # fmt: skip
    assert missing - {*found, *host.flat()} == set()
    for old, new in protocol.OLD_NAMES.items():
        assert found[old] == found[new]


def test_freeable_says_of_each_and_in_all(directory: Path, capsys: Output) -> None:
    with used_pool(directory) as fd, fakes.pool(directory, "ram", has_file=False, used_bytes=9 * MIB):
        publish(fd, {0: MIB, 15: 2 * MIB}, {15: MIB})
        assert ctl(directory, "freeable", "--json") == 0
        found = parsed(capsys)
        ram, web = found["pools"]
        assert (ram["freeable_bytes"], ram["idle_bytes"]) == (0, None)
        assert 9 * MIB < web["freeable_bytes"] == found["freeable_bytes"] < 10 * MIB
        assert (web["idle_bytes"], web["incompressible_bytes"]) == (2 * MIB, MIB)
        assert ctl(directory, "freeable", "ram") == 0
        assert capsys.readouterr().out.splitlines()[-1] == "0 in all"
        assert ctl(directory, "freeable", "ram", "none") == 1
        assert "there is no pool none" in capsys.readouterr().err


def test_host_says_what_there_is(tmemd: fakes.Tmemd, capsys: Output) -> None:
    assert main(["host", "--json"]) == 0
    found = parsed(capsys)
    assert 0 < found["budget_bytes"] == found["total_bytes"] // 2
    assert found["policy"] == "fair"
    assert main(["host", f"--socket={tmemd.socket}"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["total"].startswith(f"{found['total_bytes']} (")
    assert lines["writes"] == "left unbounded"


def test_a_host_below_its_reserve_is_warned_of(
    directory: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fakes.tmemd(directory, config='[budget]\nreserve = "100%"\n') as running:
        monkeypatch.setenv("TMEMD_SOCKET", str(running.socket))
        assert main(["host"]) == 0
    assert "less available than its reserve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "asked", "choice"),
    [
        (["3M"], 3 * MIB, (0, False)),
        (["--idle=30"], 10 * MIB, (7, False)),
        (["--idle=70", "--incompressible"], 10 * MIB, (15, True)),
        (["1M", "--idle=0.1"], MIB, (2, False)),
        (["--incompressible"], 10 * MIB, (0, True)),
    ],
)
def test_demote_chooses_pages(directory: Path, options: list[str], asked: int, choice: tuple[int, bool]) -> None:
    with used_pool(directory), Plugin(directory, "web", 0) as plugin:
        assert ctl(directory, "demote", "web", *options) == 0
    assert plugin.asked == [Queued(1, Request.DEMOTE, asked, Choice(*choice))]


@pytest.mark.parametrize("options", [[], ["--idle=71"], ["--idle=-1"], ["--idle=nan"], ["--idle=x"], ["much"]])
def test_demote_of_nothing_in_particular_is_a_usage_error(directory: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        ctl(directory, "demote", "web", *options)
    assert usage.value.code == 2


def test_every_program_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (main, start.main):
        with pytest.raises(SystemExit) as ended:
            program(["--version"])
        assert ended.value.code == 0
    assert capsys.readouterr().out == f"tmemctl {version()}\ntmemd {version()}\n"
