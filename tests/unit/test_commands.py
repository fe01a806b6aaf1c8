# SPDX-License-Identifier: BSD-3-Clause
"""Every command of tmemctl keeps the same promises: one row for each, and none is forgotten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import shtab

from scripts.completions import parsers
from scripts.manpages import PAGES
from tests.support import fakes, leftovers
from tests.support.devicehost import devicehost
from tests.support.harness import DEADLINE, MIB
from tests.support.plugin import Plugin
from tests.support.saving import Host
from tmemd.cli import main
from tmemd.cli.commands import COMMANDS
from tmemd.cli.common import SCHEMA
from tmemd.simulation.recording import Writer, new_header

Output = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Row:
    """How a command is called, and what comes of it.

    In arguments {pools} is a directory with the pools web, which a plugin serves, golden, which is ephemeral, and idle;
    {blinking} one in which a pool comes and goes; {socket} that of a tmemd; {new} a file that is not there;
    {recording} one that `record` wrote; {device} a device of a host that has no others; {saved} a directory with a pool
    that can be saved, {saved}.save what was.
    """

    good: str  # arguments with which it does what it is for, and ends
    names: str  # in each object of its JSON
    bad: str  # arguments of which one is wrong
    status: int  # what it ends with then
    error: str  # in what it says then
    lasts: str | None = None  # arguments with which it waits, if it ever does
    interrupted: int = 130  # what it ends with when Ctrl-C comes then


AT = "--pools={pools}"
NONE = "there is no pool none"
ROWS = {
    "list": Row(f"{AT} web", "name state used_bytes connections", f"{AT} none", 1, NONE, f"{AT} --watch"),
    "show": Row(f"{AT} web", "name state used_bytes hit_share", f"{AT} none", 1, NONE),
    "top": Row(f"{AT} --once --interval=0.1", "time pools", f"{AT} --interval=0", 2, "seconds", AT),
    "host": Row("--socket={socket}", "budget_bytes policy", "--socket={new}", 1, "is it running?"),
    "events": Row(
        "--pools={blinking} --count=1", "event pool time", f"{AT} --count=0", 2, "number of events", lasts=AT
    ),
    "wait": Row(
        f"{AT} web --state=served", "name state", f"{AT} web --state=gone --timeout=0", 124, "is not gone",
        lasts=f"{AT} web --state=gone",
    ),
    "freeable": Row(f"{AT} web", "freeable_bytes pools", f"{AT} none", 1, NONE),
    "map": Row(f"{AT} idle", "name pages counts ranges", f"{AT} none", 1, NONE),
    "hot": Row(f"{AT} idle", "name size uuid ranges", f"{AT} none", 1, NONE),
    "set": Row(f"{AT} web --compression=off", "name compression_enabled", f"{AT} web", 2, "nothing to set"),
    "freeze": Row(f"{AT} web", "name frozen", f"{AT} none", 1, NONE),
    "thaw": Row(f"{AT} web", "name frozen", AT, 2, "NAME"),
    "drain": Row(f"{AT} web", "name pages_in_tmem", f"{AT} golden", 1, "'tmemctl flush'", f"{AT} web"),
    "demote": Row(f"{AT} web 1M", "name used_bytes", f"{AT} web", 2, "which pages?", f"{AT} web 1M"),
    "compact": Row(f"{AT} web", "name used_bytes", f"{AT} idle", 1, "nobody serves", f"{AT} web"),
    "flush": Row(f"{AT} golden", "name used_bytes", f"{AT} web", 1, "is persistent"),
    "handover": Row(f"{AT} web", "name durable handed_over", f"{AT} idle", 1, "nobody serves", f"{AT} web"),
    "save": Row("--pools={saved} web {new}", "name file bytes pages whole", f"{AT} web {{new}}", 1, "is served"),
    "restore": Row("--pools={saved} web {saved}.save", "name state", f"{AT} web {{recording}}", 1, "is served"),
    "destroy": Row(f"{AT} idle", "destroyed", f"{AT} web", 1, "is served"),
    "check": Row("{pools}/idle.pool", "ok problems", "{new}/none", 1, "none"),
    "record": Row(
        f"{AT} --duration=0.01 {{new}}", "file samples", f"{AT} {{new}}/none", 1, "none", f"{AT} {{new}}",
        interrupted=0,
    ),
    "simulate": Row("{recording}", "outcomes times", "{pools}/idle.pool", 1, "idle.pool"),
    "plugin-path": Row("", "path", "more", 2, "unrecognized"),
    "create": Row("new --size=8M", "name state qemu libvirt nbd fstab", "Web --size=8M", 1, "is no name"),
    "attach-info": Row("{device}", "name qemu libvirt nbd fstab", "none", 1, "no device none is defined"),
    "start": Row("{device}", "name state", "none", 1, "no device none is defined"),
    "stop": Row("{device}", "name state", "none", 1, "no device none is defined"),
    "restart": Row("{device}", "name state", "none", 1, "no device none is defined"),
    "resize": Row("{device} 16M", "name size", "{device} 8X", 2, "is not a size"),
    "rename": Row("{device} new", "name renamed", "none new", 1, "no device none is defined"),
    "remove": Row("{device}", "name state", "none", 1, "no device none is defined"),
}  # fmt: skip
OF_DEVICES = {"create", "attach-info", "start", "stop", "restart", "resize", "rename", "remove"}
each_command = pytest.mark.parametrize("command", ROWS)


def test_no_command_is_forgotten() -> None:
    assert set(ROWS) == set(COMMANDS)


def blink(directory: Path, over: threading.Event) -> None:
    while not over.wait(0.3):
        with fakes.pool(directory, "blink"):
            over.wait(0.6)
        (directory / "blink.pool").unlink()


@pytest.fixture
def places(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What stands for the names in braces."""
    monkeypatch.setenv("TMEMD_ROOT", str(tmp_path))
    with ExitStack() as stack:
        stack.enter_context(fakes.pool(directory, "web"))
        stack.enter_context(Plugin(directory, "web", 0))
        stack.enter_context(fakes.pool(directory, "golden", ephemeral=True))
        idle = stack.enter_context(fakes.filled(directory, "idle"))
        idle.word(0, 2)
        idle.finish()
        recording = tmp_path / "recording"
        with Writer(recording, new_header(0.5, "")):
            pass
        yield {
            "pools": str(directory), "new": str(tmp_path / "new"), "recording": str(recording),
            "socket": "", "blinking": "", "device": "web", "saved": "",
        }  # fmt: skip


def words(command: str, arguments: str, places: dict[str, str]) -> list[str]:
    return [command, *arguments.format(**places).split()]


@pytest.fixture
def around(directory: Path, places: dict[str, str], command: str, capsys: Output) -> Iterator[dict[str, str]]:
    """The same, with what only some commands need."""
    with ExitStack() as stack:
        if "{socket}" in ROWS[command].good:
            running = stack.enter_context(fakes.tmemd(directory))
            places["socket"] = str(running.socket)
        if "{blinking}" in ROWS[command].good:
            base, over = stack.enter_context(fakes.on_tmpfs()), threading.Event()
            thread = threading.Thread(target=blink, args=(base, over))
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
            places["blinking"] = str(base)
        if command in OF_DEVICES:
            stack.enter_context(devicehost())
            if command != "create":
                main(["create", places["device"], "--size=8M"])
                capsys.readouterr()
        if "{saved}" in ROWS[command].good:
            host = Host(stack.enter_context(leftovers.directory("/dev/shm")) / "pools", None, 8 * MIB)
            host.begin()
            places["saved"] = str(host.pools)
            assert host.ctl("save", "web", f"{host.pools}.save") == 0
            capsys.readouterr()
        yield places


@pytest.fixture(scope="module")
def manual() -> str:
    """tmemctl(8), as a terminal shows it."""
    command = ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=200n"]
    return subprocess.run(command, input=PAGES["tmemctl.8"](), capture_output=True, text=True, check=True).stdout


@each_command
def test_help_and_the_manual_say_the_same(command: str, manual: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: tmemctl {command} ")
    (section,) = re.findall(rf"^   tmemctl {command}\b.*\n+((?:      .*\n|\n)+)", manual, re.MULTILINE)
    assert " ".join(section.split())[:40] in text


@pytest.fixture(scope="module")
def completion() -> dict[str, set[str]]:
    """The options that bash is told of, by command."""
    (parser,) = (each for each in parsers() if each.prog == "tmemctl")
    told = re.findall(r"^_shtab_tmemctl_(\w+)_option_strings=\((.*)\)$", shtab.complete(parser, "bash"), re.MULTILINE)
    return {command: set(options.split()) for command, options in told}


@each_command
def test_shells_complete_what_help_tells(command: str, completion: dict[str, set[str]], capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, *options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert completion[command.replace("-", "_")] > set(options) >= {"--json"}


def objects(text: str) -> list[dict[str, Any]]:
    """Those of one value, or of a value on each line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in text.splitlines()]
    return found if isinstance(found, list) else [found]


@each_command
def test_it_does_what_it_is_for_and_says_so_in_json(command: str, around: dict[str, str], capsys: Output) -> None:
    row = ROWS[command]
    assert main(["--json", *words(command, row.good, around)]) == 0
    output = capsys.readouterr()
    found = objects(output.out)
    assert found
    for each in found:
        assert each["schema"] == SCHEMA
        assert set(row.names.split()) <= set(each)


@each_command
def test_without_json_it_says_it_to_people(command: str, around: dict[str, str], capsys: Output) -> None:
    assert main(words(command, ROWS[command].good, around)) == 0
    assert "Traceback" not in capsys.readouterr().err


@each_command
def test_bad_input_is_one_clear_line_and_a_status(command: str, places: dict[str, str], capsys: Output) -> None:
    row = ROWS[command]
    if row.status == 2:
        with pytest.raises(SystemExit) as usage:
            main(words(command, row.bad, places))
        assert usage.value.code == 2
    else:
        assert main(words(command, row.bad, places)) == row.status
    *before, last = capsys.readouterr().err.splitlines()
    assert row.error in last
    assert last.startswith(f"tmemctl {command}: error: " if row.status == 2 else "tmemctl: ")
    assert not before or row.status == 2, "usage stands before its error"


@each_command
def test_an_option_that_is_none_is_a_usage_error(command: str, places: dict[str, str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as usage:
        main([*words(command, ROWS[command].good, places), "--jsno"])
    assert usage.value.code == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: --jsno; did you mean '--json'?\n")


# Ctrl-C the moment that the command begins, or waits.
INTERRUPTED = """
import signal, sys
import tmemd.cli

def look(frame, event, what):
    begins = event == "call" and frame.f_code.co_name == "run" and "/tmemd/cli/" in frame.f_code.co_filename
    waits = event == "c_call" and what.__name__ in ("sleep", "sigtimedwait")
    if waits if sys.argv[1] == "waits" else begins and not frame.f_code.co_filename.endswith("commands.py"):
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

sys.setprofile(look)
sys.exit(tmemd.cli.main(sys.argv[2:]))
"""


@each_command
def test_ctrl_c_ends_it_without_a_traceback(command: str, places: dict[str, str]) -> None:
    row = ROWS[command]
    tries = [("begins", row.good, 130)]
    if row.lasts is not None:
        tries.append(("waits", row.lasts, row.interrupted))
    for when, arguments, status in tries:
        process = [sys.executable, "-c", INTERRUPTED, when, *words(command, arguments, places)]
        done = subprocess.run(process, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert (when, done.returncode, done.stderr) == (when, status, "")
