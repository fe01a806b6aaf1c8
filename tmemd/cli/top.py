# SPDX-License-Identifier: BSD-3-Clause
"""Watch the pools: who uses how much RAM, and how well it serves.

Keys: q quits, s sorts by something else, p pauses. Rates, hits and latencies (median and 99th percentile) are those of
the interval before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NoReturn

from rich.console import Console
from rich.live import Live

from tmemd.cli import common
from tmemd.cli.screen import SORTS, View, draw
from tmemd.cli.watch import Frame, Watch

_PLAIN_WIDTH: Final = 240  # of what goes into a file or pipe: all columns

_ESCAPE_SEQUENCE: Final = re.compile(rb"\x1b(\[[0-9;]*.|O.|.)?", re.DOTALL)  # of an arrow or function key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    common.add_where(parser)
    add = parser.add_argument
    add("--interval", type=common.seconds(0.1, 3600), default=1.0, metavar="SECONDS",
        help="between two looks (%(default)g)")  # fmt: skip
    add("--sort", choices=SORTS, default="used", help="what comes first (%(default)s)")
    add("--batch", type=common.count("intervals"), metavar="N", help="print N intervals, one below the other, and end")
    add("--once", dest="batch", action="store_const", const=1, help="the same as --batch 1")


def run(arguments: argparse.Namespace) -> int:
    """Watch until told to stop."""
    watch = Watch(common.client(arguments))
    frame = watch.look()
    console = Console(highlight=False)
    if arguments.json or arguments.batch or not console.is_terminal or console.is_dumb_terminal:
        _print(watch, arguments, console)
    else:
        _live(watch, frame, arguments, console)
    return 0


# For scripts: one interval below the other.


def _print(watch: Watch, arguments: argparse.Namespace, console: Console) -> None:
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH, highlight=False, color_system=None)
    away = False
    for number in range(arguments.batch) if arguments.batch else itertools.count():
        time.sleep(arguments.interval)
        frame = watch.look()
        if arguments.json:
            common.print_json_line(frame.builtins())
        elif frame.error is None:
            _print_table(frame, console, arguments.sort, first=number == 0)
        elif not away:
            common.warn(f"{frame.error}; trying again")
        away = frame.error is not None


def _print_table(frame: Frame, console: Console, sort: str, *, first: bool) -> None:
    if not first:
        console.print()
    console.print(time.strftime("%H:%M:%S", time.localtime(frame.time)))
    console.print(draw(frame, _view(console, sort, None)))
    console.file.flush()


def _view(console: Console, sort: str, height: int | None) -> View:
    return View(console.width, height, sort, ascii_only=console.options.ascii_only)


# For people: a picture that changes in its place.


def _live(watch: Watch, frame: Frame, arguments: argparse.Namespace, console: Console) -> None:
    sort, paused = arguments.sort, False
    due = time.monotonic() + arguments.interval
    with ExitStack() as resources:
        keys = resources.enter_context(_keys())
        live = resources.enter_context(Live(console=console, screen=True, auto_refresh=False))
        while True:
            hint = f"{'PAUSED' if paused else f'every {arguments.interval:g} s'}   q quit  s sort  p pause"
            live.update(draw(frame, _view(console, sort, console.height), hint), refresh=True)
            pressed = keys.wait(None if paused else max(0.0, due - time.monotonic()))
            if "q" in pressed:
                return
            if "s" in pressed:
                sort = _after(sort)
            if "p" in pressed or " " in pressed:
                paused = not paused
            if not paused and time.monotonic() >= due:
                frame = watch.look()
                due = max(due + arguments.interval, time.monotonic())


def _after(sort: str) -> str:
    names = list(SORTS)
    return names[(names.index(sort) + 1) % len(names)]


class _Keys:
    """What is typed, and a wake-up when the terminal changes its size."""

    def __init__(self, resized: int) -> None:
        self._resized = resized
        self._input = [sys.stdin.fileno()] if sys.stdin and sys.stdin.isatty() else []

    def wait(self, timeout: float | None) -> str:
        """The keys pressed, as soon as there are any; '' after *timeout* seconds or when the size changed."""
        ready, _, _ = select.select([*self._input, self._resized], [], [], timeout)
        if self._resized in ready:
            os.read(self._resized, 4096)
        if not set(self._input) & set(ready):
            return ""
        pressed = os.read(self._input[0], 64)
        if not pressed:
            self._input.clear()
        return _ESCAPE_SEQUENCE.sub(b"", pressed).decode(errors="replace").lower()


@contextmanager
def _keys() -> Iterator[_Keys]:
    """Single keys without echo, for the length of a with block; SIGTERM leaves it in order."""
    with ExitStack() as resources:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        resources.callback(os.close, reading)
        resources.callback(os.close, writing)
        resources.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
        for number, handler in ((signal.SIGWINCH, lambda *_: None), (signal.SIGTERM, _terminate)):
            resources.callback(signal.signal, number, signal.signal(number, handler))
        if sys.stdin and sys.stdin.isatty():
            before = termios.tcgetattr(sys.stdin)
            resources.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
            tty.setcbreak(sys.stdin)
            _ignore_suspend()
        yield _Keys(reading)


def _ignore_suspend() -> None:
    """Ctrl-Z would leave the shell on our screen."""
    attributes = termios.tcgetattr(sys.stdin)
    attributes[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)


def _terminate(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
