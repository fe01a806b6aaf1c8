# SPDX-License-Identifier: BSD-3-Clause
"""Play the host of a demonstration: show where a device's pages are, and take its RAM away in the middle.

Usage: python -m tests.vm.demo TMEMD_SOCKET NAME < GUEST_OUTPUT
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from tmemd.client import Client
from tmemd.protocol import PoolStatus
from tmemd.sizes import format_size
from tmemd.store.poolfile import PAGE, PoolError

BAR = 32
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 5.0


def describe(status: PoolStatus) -> str:
    """One line: a bar that divides the pages between tmem and the file, and the figures behind it."""
    counters = status.counters
    pages = counters.pages_in_tmem + counters.pages_in_file
    in_tmem = round(BAR * counters.pages_in_tmem / pages) if pages else 0
    bar = "#" * in_tmem + ("." if pages else " ") * (BAR - in_tmem)
    return (
        f"[{bar}] tmem {format_size(counters.pages_in_tmem * PAGE)} in {format_size(counters.used_bytes)} of RAM"
        f" (target {format_size(status.target_bytes)}), file {format_size(counters.pages_in_file * PAGE)}"
    )


class Screen:
    """Lines that stay, and a status below them: in place on a terminal, repeated now and then in a log."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._status = ""
        self.seconds = TERMINAL_SECONDS if self._live else LOG_SECONDS

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self._lock:
            print(f"\r\033[K{line}\n{self._status}" if self._live else f"{line}\n", end="", flush=True)

    def show(self, status: str) -> None:
        """Replace the status."""
        with self._lock:
            self._status = status
            print(f"\r\033[K{status}" if self._live else f"{status}\n", end="", flush=True)


class Host:
    """The host's side of the demonstration."""

    def __init__(self, client: Client, name: str, screen: Screen) -> None:
        self._client = client
        self._name = name
        self._screen = screen
        self._limit = client.pool(name).target_bytes
        self._start = time.monotonic()

    def watch(self, stop: threading.Event) -> None:
        """Show the device's state until told to stop."""
        while not stop.wait(self._screen.seconds):
            try:
                state = describe(self._client.pool(self._name))
            except PoolError as error:
                state = str(error)
            self._screen.show(f"{time.monotonic() - self._start:4.0f} s {state}")

    def hear(self, line: str) -> None:
        """Pass a line of the guest's on; when its memory is full take half of the RAM, later return it."""
        self._screen.say(f"guest | {line}")
        if "filled all" in line:
            self._set_target(self._limit // 2, "the host needs its RAM for something else")
        elif "verified all" in line:
            self._set_target(self._limit, "the host has RAM to spare again")

    def _set_target(self, target: int, why: str) -> None:
        self._screen.say(f"host  | {why}: target {format_size(target)}")
        self._client.set_target(self._name, target)


def main() -> None:
    """Go on until the guest ends."""
    screen = Screen()
    host = Host(Client.of_daemon(Path(sys.argv[1])), sys.argv[2], screen)
    stop = threading.Event()
    watcher = threading.Thread(target=host.watch, args=(stop,))
    watcher.start()
    try:
        for line in sys.stdin:
            _, _, text = line.rstrip().partition(" ")  # the time it was said
            host.hear(text)
    finally:
        stop.set()
        watcher.join()
        print()


if __name__ == "__main__":
    main()
