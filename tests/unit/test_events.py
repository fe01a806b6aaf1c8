# SPDX-License-Identifier: BSD-3-Clause
"""What happens to pools is told once, to those who may know of it, with nothing lost between two questions."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import fakes
from tests.support.harness import DEADLINE
from tmemd.cli import main
from tmemd.cli.common import SCHEMA
from tmemd.client import attach_pool
from tmemd.daemon import journal as journals
from tmemd.daemon.access import Access
from tmemd.daemon.journal import Journal
from tmemd.events import REFUSED_EVERY, Seen, Watcher
from tmemd.protocol import MAX_WAIT, Event, Problem

MIB = fakes.MIB
SERVED = Seen(uid=5, pid=7, target=100 * MIB, refused=3, nbd=0, vhost=0)
IDLE = Seen(uid=5, pid=None, target=MIB, refused=0, nbd=0, vhost=0)


def changed(seen: Seen, **fields: Any) -> Seen:
    return msgspec.structs.replace(seen, **fields)


def told(*looks: dict[str, Seen], every: float = 1.0) -> list[dict[str, Any]]:
    """What is told of these looks, without whose pools they are."""
    watcher = Watcher()
    events = [event for at, pools in enumerate(looks) for event in watcher.look(pools, [], at * every)]
    return [{key: value for key, value in msgspec.to_builtins(event).items() if key != "uid"} for event in events]


def test_what_is_there_at_first_is_no_news() -> None:
    assert told({"web": SERVED}, {"web": SERVED}, {"web": SERVED}) == []


def test_pools_and_plugins_come_and_go() -> None:
    again = changed(SERVED, pid=8)
    assert told({}, {"web": IDLE}, {"web": SERVED}, {"web": again}, {"web": IDLE}, {}) == [
        {"event": "appeared", "pool": "web"},
        {"event": "served", "pool": "web", "pid": 7},
        {"event": "unserved", "pool": "web", "pid": 7},
        {"event": "served", "pool": "web", "pid": 8},
        {"event": "unserved", "pool": "web", "pid": 8},
        {"event": "gone", "pool": "web"},
    ]


def test_clients_come_and_go() -> None:
    assert told({"web": SERVED}, {"web": changed(SERVED, nbd=2)}, {"web": changed(SERVED, pid=None)}) == [
        {"event": "clients", "pool": "web", "connections": {"nbd": 2, "vhost": 0}},
        {"event": "unserved", "pool": "web", "pid": 7},
        {"event": "clients", "pool": "web", "connections": {"nbd": 0, "vhost": 0}},
    ]


def test_a_target_that_creeps_is_told_when_it_has_come_far() -> None:
    looks = [{"web": changed(SERVED, target=(100 + step) * MIB)} for step in range(9)]
    assert told(*looks) == [
        {"event": "target", "pool": "web", "target_bytes": 106 * MIB, "before_bytes": 100 * MIB},
    ]  # fmt: skip


def test_refused_pages_are_told_now_and_then() -> None:
    looks = [{"web": changed(SERVED, refused=3 + 10 * step)} for step in range(6)]
    assert [event["pages"] for event in told(*looks, every=REFUSED_EVERY / 2)] == [10, 20, 20]
    anew = {"web": changed(SERVED, refused=1)}
    assert [event["pages"] for event in told(looks[-1], anew, every=REFUSED_EVERY)] == [1]


def test_a_plugin_that_comes_back_brings_no_old_refusals() -> None:
    assert [event["event"] for event in told({"web": SERVED}, {"web": IDLE}, {"web": SERVED})] == ["unserved", "served"]
    assert [event["event"] for event in told({"web": IDLE}, {"web": SERVED})] == ["served"]


def test_problems_come_and_are_mended() -> None:
    watcher, bad, worse = Watcher(), Problem("x", "bad"), Problem("x", "worse")
    looks = [watcher.look({}, problems, 0.0) for problems in ([], [bad], [bad], [worse], [])]
    assert [[(event.event, event.words) for event in events] for events in looks] == [
        [], [("problem", "bad")], [], [("problem", "worse")], [("mended", "worse")],
    ]  # fmt: skip


def test_who_was_away_for_long_hears_that_events_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_KEPT", 2)
    journal = Journal()
    first = journal.last
    journal.add([Event(event="gone", pool=name) for name in "abc"])
    events, missed = journal.since(first)
    assert ([event.pool for event in events], missed) == (["b", "c"], True)
    assert journal.since(events[0].number) == (events[1:], False)
    assert journal.since(Journal().last) == ([], False)
    assert Journal().since(first)[1], "an earlier tmemd's are forgotten, too"


class Listener:
    """A `tmemctl events` that runs."""

    def __init__(self, process: subprocess.Popen[str], make: Callable[[str], object]) -> None:
        assert process.stdout
        self._output = process.stdout
        self._make = make
        self._made = 0

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of that kind."""
        events = map(json.loads, iter(self._output.readline, ""))
        return next(event for event in events if event["event"] == kind)

    def begin(self) -> dict[str, Any]:
        """Make pools until it hears of one: only so is it known to listen."""
        while not select.select([self._output], [], [], 0.3)[0]:
            self.make_pool()
        return self.until("appeared")

    def make_pool(self) -> str:
        """Another one."""
        self._made += 1
        self._make(f"p{self._made}")
        return f"p{self._made}"


def attached(running: fakes.Tmemd, name: str) -> None:
    fd, _ = attach_pool(running.socket, running.attach(name))
    os.close(fd)


def made(directory: Path, name: str) -> None:
    with fakes.pool(directory, name):
        pass


@contextmanager
def listening(make: Callable[[str], object], *options: str) -> Iterator[Listener]:
    """A `tmemctl events` with these options, and what makes a pool of a name."""
    command = [sys.executable, "-u", "-m", "tmemd.cli", "events", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1) as process:
        try:
            yield Listener(process, make)
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 130
        finally:
            process.kill()


def test_tmemctl_prints_them_as_they_come(directory: Path) -> None:
    with (
        fakes.tmemd(directory) as running,
        listening(partial(attached, running), f"--socket={running.socket}") as listener,
    ):
        event = listener.begin()
        assert (event["schema"], event["uid"], event["number"] > 0) == (SCHEMA, os.geteuid(), True)
        name = listener.make_pool()
        while listener.until("appeared")["pool"] != name:
            pass
        running.client.destroy(name)
        assert listener.until("gone")["pool"] == name


def test_without_a_tmemd_it_looks_for_itself(directory: Path) -> None:
    with listening(partial(made, directory), f"--pools={directory}") as listener:
        assert listener.begin()["pool"].startswith("p")


def test_tmemctl_goes_on_where_tmemd_comes_back(directory: Path) -> None:
    running = fakes.start_tmemd(directory)
    try:
        with listening(lambda name: attached(running, name), f"--socket={running.socket}") as listener:
            listener.begin()
            running.stop(signal.SIGKILL)
            running = fakes.start_tmemd(directory)
            listener.until("missed")
            name = listener.make_pool()
            while listener.until("appeared")["pool"] != name:
                pass
    finally:
        running.stop()


def test_it_ends_after_so_many_of_a_pool(directory: Path) -> None:
    command = [sys.executable, "-m", "tmemd.cli", "events", "--count=1", "b", f"--pools={directory}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            with fakes.pool(directory, "a"):
                while process.poll() is None:
                    with fakes.pool(directory, "b"):
                        select.select([process.stdout], [], [], 0.6)
                    (directory / "b.pool").unlink()
                    select.select([process.stdout], [], [], 0.6)
            (event,) = map(json.loads, process.stdout)
            assert (process.returncode, event["pool"]) == (0, "b")
        finally:
            process.kill()


def test_another_users_pool_is_none_of_his_business(directory: Path) -> None:
    with fakes.tmemd(directory) as running:
        number = running.client.events().number
        attached(running, "web")
        (event,) = running.client.events(number, MAX_WAIT).events
        assert (event.event, event.pool, event.uid) == ("appeared", "web", os.geteuid())
        access = Access(frozenset())
        assert access.may_see(event.uid, os.geteuid())
        assert not access.may_see(event.uid, 4711)
        assert access.may_see(None, 4711), "what is of no pool"


def test_no_tmemd_is_an_error(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", f"--socket={directory}/nobody"]) == 1
    assert "is it running?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--target-change=1", "--target-change=x", "--count=0"])
def test_options_that_are_none_are_usage_errors(option: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["events", option])
    assert usage.value.code == 2
