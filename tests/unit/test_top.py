# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.support import fakes
from tests.support.harness import DEADLINE, ROOT
from tests.support.statuses import HOST, status
from tmemd.cli import main
from tmemd.cli.activity import Activity, activity
from tmemd.cli.screen import SORTS, View, draw, format_count, format_seconds
from tmemd.cli.watch import Frame
from tmemd.client import Client
from tmemd.protocol import HostStatus

MIB = fakes.MIB
GIB = 1 << 30
Output = pytest.CaptureFixture[str]


def frame(*pools: Activity, host: HostStatus | None = None, **changes: Any) -> Frame:
    return replace(Frame(time.time(), 1.0, host, list(pools), []), **changes)


# Activity


def test_rates_are_of_the_interval() -> None:
    before = status(puts=1000, gets=500, file_reads=10, spills=1, demotions=0, puts_refused=7)
    now = status(puts=1500, gets=590, file_reads=20, spills=1, demotions=30, puts_refused=9)
    seen = activity(before, now, 2.0)
    assert (seen.puts, seen.gets, seen.file_reads, seen.spills, seen.demotions) == (250, 45, 5, 0, 15)
    assert seen.refusals == 1
    assert seen.hit_share == pytest.approx(0.9)


def test_compression_is_pages_by_what_they_take() -> None:
    assert activity(None, status(), 1.0).compression_ratio is None
    assert activity(None, status(pages_in_tmem=3, payload_bytes=4096), 1.0).compression_ratio == 3.0


def test_without_an_interval_there_are_no_rates() -> None:
    now = status(puts=5, gets=5, put=5)
    damaged = status(error="it is damaged")
    for before, after in ((None, now), (damaged, now), (now, damaged), (status(puts=6), now)):
        seen = activity(before, after, 1.0)
        assert (seen.puts, seen.gets, seen.hit_share, seen.put_seconds.median) == (0, 0, None, None)


def test_latencies_are_of_the_interval() -> None:
    seen = activity(status(put=10), status(put=30), 1.0)
    assert seen.put_seconds.median == pytest.approx(896e-9)
    assert seen.put_seconds.p99 == pytest.approx((768 + 256 * 0.99) * 1e-9)
    assert seen.get_seconds.median is None
    assert activity(status(put=10), status(put=10), 1.0).put_seconds.median is None


def test_warnings_come_with_the_gravest_first() -> None:
    now = status(pages_lost=1, bad_checksums=1, io_errors=1, puts=1 << 20)
    now = msgspec.structs.replace(now, frozen=True, served=False)
    expected = ["lost pages", "bad checksums", "I/O errors", "never trims", "frozen", "idle"]
    assert activity(None, now, 1.0).warnings == expected
    assert activity(None, status(error="x"), 1.0).warnings == ["damaged"]
    assert activity(None, status(puts=1 << 20, trims=1), 1.0).warnings == []


# The picture


def test_numbers_fit_their_columns() -> None:
    values = [0, 1, 9.94, 9.96, 99.9, 999.4, 999.6, 9999, 99_940, 99_960, 999_499, 999_501, 5e8, 99.9e9]
    assert max(len(format_count(value)) for value in values) <= 5
    assert [format_count(value) for value in (0, 1.5, 2.0, 850, 12_300, 999_600)] == [
        "0", "1.5", "2", "850", "12.3k", "1.0M",
    ]  # fmt: skip
    seconds = [n * 10.0**-e for e in range(-1, 11) for n in (1, 1.5, 9.96, 9.994, 99.96)]
    assert max(len(format_seconds(value)) for value in seconds) <= 5
    shown = [format_seconds(value) for value in (None, 0, 850e-9, 3.14e-6, 12e-3, 0.9996, 1.5)]
    assert shown == ["-", "0ns", "850ns", "3.1us", "12ms", "1.0s", "1.5s"]


def lines(picture: Frame, view: View, keys: str = "q quit") -> list[str]:
    """What the terminal shows, without colours."""
    console = Console(width=view.width, height=view.height, file=io.StringIO(), color_system=None, highlight=False)
    console.print(draw(picture, view, keys))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def busy(number: int) -> Activity:
    name = f"guest-{number:03}"
    seen = status(name, used_bytes=number * MIB, pages_in_tmem=600 * number, payload_bytes=800_000 * number)
    return activity(None, seen, 1.0)


@pytest.mark.parametrize("host", [HOST, None])
@pytest.mark.parametrize("count", [0, 3, 120])
def test_it_fills_the_terminal_and_never_more(count: int, host: HostStatus | None) -> None:
    picture = frame(*map(busy, range(count)), host=host, notes=["a: bad"], error="tmemd is away")
    for width in (12, 20, 40, 79, 80, 100, 133, 200, 300):
        for height in (12, 24, 50):
            shown = lines(picture, View(width, height))
            assert len(shown) == height, f"{width}x{height}"
            assert max(map(len, shown)) <= width


def test_what_does_not_fit_is_counted() -> None:
    shown = lines(frame(*map(busy, range(120))), View(100, 24))
    guests = [line for line in shown if line.startswith("guest-")]
    assert guests[0].startswith("guest-119")
    (rest,) = (line for line in shown if line.startswith("and "))
    left = 120 - len(guests)
    assert rest.split(",")[0] == f"and {left} more"
    assert len(guests) > 12


def test_a_wide_terminal_shows_every_column_and_a_narrow_one_what_matters() -> None:
    wide, narrow = ("\n".join(lines(frame(busy(1)), View(width, 24))) for width in (240, 60))
    for title in ("WEIGHT", "IN TMEM", "RATIO", "HITS", "DEMOTED", "reads/s", "median   p99", "KIND", "STATE"):
        assert title in wide
    for title in ("GUEST", "USED", "TARGET", "STATE"):
        assert title in narrow
    assert "WEIGHT" not in narrow


def test_long_names_can_still_be_told_apart() -> None:
    pools = (activity(None, status("a-name-that-is-rather-long-" + end), 1.0) for end in ("one", "two"))
    shown = "\n".join(lines(frame(*pools), View(80, 24)))
    assert "one " in shown
    assert "two " in shown


def test_numbers_stay_in_their_place_from_frame_to_frame() -> None:
    def heading(*pools: Activity) -> str:
        return next(line for line in lines(frame(*pools), View(160, 24)) if line.startswith("GUEST"))

    hectic = activity(status(), status(puts=10**9, puts_refused=10**8, gets=10**7, used_bytes=60 * MIB), 1.0)
    assert heading(activity(None, status(), 1.0)) == heading(hectic)


def test_bars_are_drawn_on_one_scale() -> None:
    full = activity(None, status("full", used_bytes=64 * MIB), 1.0)
    half = msgspec.structs.replace(full, name="half", used_bytes=32 * MIB, target_bytes=48 * MIB)
    over = msgspec.structs.replace(full, name="over", target_bytes=16 * MIB)
    shown = lines(frame(full, half, over), View(100, 24, ascii_only=True))
    bars = {line.split()[0]: re.findall("=[=.-]*", line) for line in shown if "=" in line}
    ((whole,), (part,), (beyond,)) = bars["full"], bars["half"], bars["over"]
    assert set(whole) == set(beyond) == {"="}
    assert len(whole) == len(beyond)
    assert part.count("=") == pytest.approx(len(whole) / 2, abs=0.5)
    assert len(part) == pytest.approx(len(whole) * 0.75, abs=1)


@pytest.mark.parametrize("sort", SORTS)
def test_each_order_puts_the_most_first(sort: str) -> None:
    quiet = activity(None, status("a"), 1.0)
    names = [line.split()[0] for line in lines(frame(quiet, busy(9)), View(100, 24, sort)) if "served" in line]
    assert names == (["guest-009", "a"] if sort == "used" else ["a", "guest-009"])


def test_the_host_is_in_the_header() -> None:
    header = " ".join(lines(frame(host=HOST), View(240, 24))[:1])
    for fact in ("policy fair", "used 5.00G of targets 6.00G", "budget 8.00G", "host 10.0G available of 32.0G",
                 "reserve 3.00G", "pressure 1.2%", "may write 2.00G"):  # fmt: skip
        assert fact in header
    bare = msgspec.structs.replace(HOST, pressure_some=None, writes_left_bytes=None)
    header = " ".join(lines(frame(host=bare), View(240, 24))[:1])
    assert "pressure" not in header
    assert "write" not in header


def test_nothing_that_a_terminal_would_obey_reaches_it() -> None:
    shown = "\n".join(lines(frame(notes=["web: \x1b[2J is wrong"], error="\x1b]0;x\x07"), View(100, 24)))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "is wrong" in shown


# For scripts


def test_one_object_for_each_interval(directory: Path, capsys: Output) -> None:
    (directory / "bad.pool").write_bytes(b"x" * 9999)
    with fakes.pool(directory, "web", used_bytes=3 * MIB):
        assert main(["top", f"--pools={directory}", "--json", "--batch=2", "--interval=0.1"]) == 0
    for line in capsys.readouterr().out.splitlines():
        seen = json.loads(line)
        assert (seen["host"], seen["error"]) == (None, None)
        bad, web = seen["pools"]
        assert (bad["state"], web["name"], web["used_bytes"], web["puts"]) == ("damaged", "web", 3 * MIB, 0)
        assert web["put_seconds"] == {"median": None, "p99": None}
        assert seen["seconds"] >= 0.1


def test_a_pipe_gets_tables_without_control_characters(directory: Path, capsys: Output) -> None:
    with fakes.pool(directory, "web"):
        assert main(["top", f"--pools={directory}", "--once", "--interval=0.1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [line.split()[0] for line in out.splitlines() if "idle" in line] == ["web"]
    assert out.count("GUEST") == 1


@pytest.mark.parametrize(
    "option", ["--interval=0", "--interval=nan", "--interval=x", "--batch=0", "--batch=-1", "--sort=x"]
)
def test_bad_options_are_usage_errors(option: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["top", "--pools=/dev/shm", option])
    assert usage.value.code == 2


def test_who_is_not_there_at_the_start_is_an_error(directory: Path, capsys: Output) -> None:
    assert main(["top", f"--socket={directory}/nothing", "--once"]) == 1
    assert main(["top", f"--pools={directory}/nothing", "--once"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def top(*options: str, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tmemd.cli", "top", "--interval=0.1", *options]
    return subprocess.Popen(command, text=True, cwd=ROOT, **({"stdout": subprocess.PIPE} | streams))


@contextmanager
def reaped(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_tmemd_may_go_and_come_back(directory: Path) -> None:
    with ExitStack() as running:
        tmemd = fakes.start_tmemd(directory)
        running.callback(tmemd.process.kill)
        with fakes.pool(tmemd.directory, "web"):
            seen = running.enter_context(reaped(top(f"--socket={tmemd.socket}", "--json")))
            assert seen.stdout
            answers = map(json.loads, seen.stdout)
            assert [pool["name"] for pool in next(answers)["pools"]] == ["web"]
            tmemd.stop(signal.SIGKILL)
            away = next(answer for answer in answers if answer["error"])
            assert (away["pools"], away["host"]) == ([], None)
            assert "tmemd" in away["error"]
            tmemd = fakes.start_tmemd(directory)
            running.callback(tmemd.process.kill)
            back = next(answer for answer in answers if not answer["error"])
            assert [pool["name"] for pool in back["pools"]] == ["web"]
            seen.send_signal(signal.SIGINT)
            assert seen.wait(DEADLINE) == 130
            tmemd.stop()


def test_a_closed_pipe_ends_it_quietly(directory: Path) -> None:
    with reaped(top(f"--pools={directory}", "--json", stderr=subprocess.PIPE)) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(DEADLINE) == 1
        assert process.stderr.read() == ""


# For people: in a terminal


class Terminal:
    """`tmemctl top` in a terminal of its own."""

    def __init__(self, *options: str, rows: int = 24, columns: int = 100, kind: str = "xterm-256color") -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.output = ""
        environment = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES", "NO_COLOR"}}
        self.process = top(
            *options, stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env=environment | {"TERM": kind},
        )  # fmt: skip

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str) -> None:
        """Read on until *pattern* was seen in what came since the last call."""
        seen = ""
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, seen):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern} is not in {seen[-2000:]!r}"
            seen += os.read(self.master, 65536).decode(errors="replace")
        self.output += seen

    def rest(self) -> str:
        """What came last, after it ended."""
        assert self.process.wait(DEADLINE) is not None
        os.set_blocking(self.master, False)
        try:
            return os.read(self.master, 1 << 20).decode(errors="replace")
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(directory: Path) -> Iterator[Terminal]:
    with fakes.pool(directory, "web", used_bytes=3 * MIB):
        terminal = Terminal(f"--pools={directory}")
        try:
            terminal.until("web")
            yield terminal
        finally:
            terminal.close()


def assert_in_order(terminal: Terminal) -> None:
    """The screen from before is back, with its cursor, and keys are echoed again."""
    left = terminal.output + terminal.rest()
    assert left.rfind("\x1b[?1049l") > left.rfind("\x1b[?1049h") >= 0
    assert left.rfind("\x1b[?25h") > left.rfind("\x1b[?25l")
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_keys_sort_pause_and_quit(terminal: Terminal) -> None:
    terminal.press("s")
    terminal.until("sorted by puts")
    terminal.press("\x1b[A")
    terminal.press("p")
    terminal.until("PAUSED")
    terminal.press("S")
    terminal.until("sorted by refusals.*PAUSED")
    terminal.press("p")
    terminal.until("every 0.1 s")
    terminal.press("q")
    assert terminal.process.wait(DEADLINE) == 0
    assert_in_order(terminal)


def test_it_follows_the_size_of_the_terminal(terminal: Terminal) -> None:
    assert "WEIGHT" not in terminal.output
    terminal.press("p")
    terminal.until("PAUSED")
    terminal.resize(30, 220)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.until("WEIGHT")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_the_terminal_in_order(terminal: Terminal, number: signal.Signals, code: int) -> None:
    terminal.process.send_signal(number)
    assert terminal.process.wait(DEADLINE) == code
    assert_in_order(terminal)


def test_a_terminal_that_can_only_print_gets_tables(directory: Path) -> None:
    with fakes.pool(directory, "web"):
        terminal = Terminal(f"--pools={directory}", kind="dumb")
        try:
            terminal.until("web(.|\n)*web")
        finally:
            terminal.close()
    assert "\x1b" not in terminal.output


def test_people_see_that_tmemd_is_away(directory: Path) -> None:
    with fakes.tmemd(directory) as tmemd, fakes.pool(tmemd.directory, "web"):
        terminal = Terminal(f"--socket={tmemd.socket}")
        try:
            terminal.until("web")
            tmemd.stop(signal.SIGKILL)
            terminal.until("trying again")
        finally:
            terminal.close()


def test_pools_that_change_hands_are_not_subtracted(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web", puts=100) as fd:
        (before,) = client.pools(long=True)
        fakes.write_counters(fd, fakes.counters(puts=3))
        fakes.write_latencies(fd, put=fakes.histogram(4, count=3))
        (now,) = client.pools(long=True)
    assert activity(before, now, 1.0).puts == 0
