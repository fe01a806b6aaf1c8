# SPDX-License-Identifier: BSD-3-Clause
"""Capture real pages: the anonymous memory of live programs, as swap would see it.

Starts a handful of ordinary programs with data of their own, waits until each is at rest, copies its anonymous memory
through /proc/PID/mem and writes distinct, non-zero 4 KiB pages to a file. The pages differ from run to run and may hold
anything those programs held: the file is made where it is needed and never kept with the sources.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PAGE: Final = 4096
PATIENCE: Final = 120.0  # seconds for a program to get ready
MIX_RUN: Final = 64  # neighbouring pages kept together when programs are mixed, as reclaim takes them

PYTHON_OBJECTS: Final = """
import ast, pathlib, sys, sysconfig
sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
kept = []
for source in sources[:60]:
    text = source.read_text(errors="replace")
    kept.append((text, ast.parse(text), text.split()))
print("ready", flush=True); sys.stdin.read()
"""

PYTHON_SERVICE: Final = """
import collections, datetime, decimal, hashlib, random, sys
rng = random.Random(7)
start = datetime.datetime(2026, 1, 1)
orders = []
by_customer = collections.defaultdict(list)
for number in range(130_000):
    order = {
        "id": number, "customer": f"customer-{rng.randrange(20_000)}", "at": start + datetime.timedelta(seconds=number),
        "total": decimal.Decimal(rng.randrange(100, 90_000)) / 100, "paid": rng.random() < 0.9,
        "token": hashlib.sha256(str(number).encode()).hexdigest()[:24],
    }
    orders.append(order)
    by_customer[order["customer"]].append(order)
print("ready", flush=True); sys.stdin.read()
"""

SQLITE: Final = """
import random, sqlite3, sys
rng = random.Random(3)
lines = [line.strip() for line in open(sys.argv[1], errors="replace").read().splitlines() if line.strip()]
db = sqlite3.connect(":memory:")
db.execute("create table orders (id integer primary key, customer text, email text, state text, at text, cents integer,"
           " currency text, note text)")
def order(number):
    customer = rng.randrange(9000)
    at = f"2026-{1 + number // 40000:02}-{1 + number % 28:02}T{number % 24:02}:{number % 60:02}:00Z"
    return (f"customer {customer}", f"customer{customer}@example.org", rng.choice(("new", "paid", "sent", "returned")),
            at, rng.randrange(100, 90_000), "EUR", rng.choice(lines) if number % 4 == 0 else None)
db.executemany("insert into orders (customer, email, state, at, cents, currency, note) values (?, ?, ?, ?, ?, ?, ?)",
               map(order, range(400_000)))
db.execute("create index by_customer on orders (customer, at)")
print("ready", flush=True); sys.stdin.read()
"""

NODE: Final = """
const fs = require('fs');
const text = fs.readFileSync(process.argv[1], 'utf8').split(/\\s+/);
const users = new Map();
for (let i = 0; i < 150000; i++) {
  const profile = JSON.parse(JSON.stringify({ i, at: new Date(i * 1e7), ok: i % 3 == 0 }));
  const tags = [text[(i * 7) % text.length], text[(i * 13) % text.length]];
  const user = { id: i, name: text[i % text.length] + i, tags, score: Math.sqrt(i) * 1.7, profile };
  users.set(user.name, user);
}
const rendered = [...users.values()].slice(0, 60000).map(user => JSON.stringify(user));
globalThis.kept = [users, rendered];
console.log('ready'); process.stdin.resume();
"""

PERL: Final = """
use strict; $| = 1;
my (%seen, @lines);
open(my $in, '<', $ARGV[0]) or die;
while (my $line = <$in>) {
    push @lines, [$., $line];
    while ($line =~ /(\\w+)/g) { push @{$seen{$1}}, $.; }
}
my %pairs = map { my $i = $_; ("key-$i" => { at => $i, value => $lines[$i % @lines][1] }) } (0 .. 120000);
print "ready\\n"; my $wait = <STDIN>;
"""

CXX_HEADERS: Final = "".join(
    f"#include <{name}>\n" for name in ("bits/stdc++.h", "regex", "ranges", "future", "filesystem", "memory_resource")
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path, help="file to write the pages to")
    parser.add_argument("--pages", type=int, default=65536, help="pages to capture (default: %(default)s, 256 MiB)")
    return parser.parse_args()


def write_words(path: Path) -> None:
    """Real text for the programs to chew on: the documentation and headers every machine has."""
    sources = [*sorted(Path("/usr/include").glob("*.h")), *sorted(Path("/usr/share/common-licenses").glob("*"))]
    path.write_bytes(b"".join(source.read_bytes() for source in sources if source.is_file()))


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[int]:
    """Start a program that prints 'ready' and then waits on its stdin; yields its pid and ends it afterwards."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{command[0]} did not get ready")
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def compiling(directory: Path) -> Iterator[int]:
    """A C++ compiler that has parsed its headers and waits for one more, which is a FIFO nobody writes to."""
    fifo, source = directory / "never.h", directory / "headers.cc"
    os.mkfifo(fifo)
    source.write_text(CXX_HEADERS + f'#include "{fifo}"\n')
    with subprocess.Popen(["g++", "-std=c++20", "-fsyntax-only", str(source)], stderr=subprocess.DEVNULL) as driver:
        writer = -1
        try:
            writer = wait_for_reader(fifo)
            yield child_of(driver.pid)
        finally:
            os.kill(child_of(driver.pid), 9)
            if writer >= 0:
                os.close(writer)


def wait_for_reader(fifo: Path) -> int:
    """Open a FIFO for writing as soon as somebody reads it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.1)
    raise TimeoutError("the compiler did not reach its last header")


def child_of(pid: int) -> int:
    """The first child of a process, or the process itself if it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def anonymous_memory(pid: int) -> Iterator[bytes]:
    """The pages of a process's private anonymous mappings, in address order."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in anonymous_ranges(pid):
            for address in range(start, end, 256 * PAGE):
                try:
                    memory.seek(address)
                    data = memory.read(min(256 * PAGE, end - address))
                except OSError:
                    continue  # guard pages cannot be read
                yield from (data[at : at + PAGE] for at in range(0, len(data), PAGE))


def anonymous_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """Address ranges without a file behind them that a program writes to."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, mode, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and mode.startswith("rw") and not (name and name[0].startswith("[v")):
            start, end = addresses.split("-")
            yield int(start, 16), int(end, 16)


def distinct_pages(pid: int, seen: set[int]) -> list[bytes]:
    """Those pages of a process that hold something nobody else's page holds."""
    zero = bytes(PAGE)
    pages = []
    for page in anonymous_memory(pid):
        if len(page) == PAGE and page != zero and (key := hash(page)) not in seen:
            seen.add(key)
            pages.append(page)
    return pages


def programs(directory: Path) -> Iterator[tuple[str, contextlib.AbstractContextManager[int]]]:
    """The programs this machine has, by name, each ready to be started."""
    words = directory / "words"
    write_words(words)
    commands = {
        "python objects": [sys.executable, "-c", PYTHON_OBJECTS],
        "python service": [sys.executable, "-c", PYTHON_SERVICE],
        "sqlite": [sys.executable, "-c", SQLITE, str(words)],
        "node": ["node", "-e", NODE, str(words)],
        "perl": ["perl", "-e", PERL, str(words)],
    }
    for name, command in commands.items():
        if shutil.which(command[0]):
            yield name, running(command)
    if shutil.which("g++"):
        yield "c++ compiler", compiling(directory)


def capture_all(directory: Path) -> dict[str, list[bytes]]:
    """Run each program in turn and take its pages."""
    seen: set[int] = set()
    captured = {}
    for name, program in programs(directory):
        with program as pid:
            captured[name] = distinct_pages(pid, seen)
        print(f"  {name}: {len(captured[name])} pages", file=sys.stderr)
    return captured


def mix(captured: dict[str, list[bytes]], wanted: int) -> list[bytes]:
    """Equal shares of each program as far as it has that many, in short runs of neighbours, programs mixed."""
    runs: list[list[bytes]] = []
    left, sources = wanted, sorted(captured.values(), key=len)
    for behind, pages in enumerate(sources):
        share = min(len(pages), -(-left // (len(sources) - behind)))
        runs += [pages[at : min(at + MIX_RUN, share)] for at in range(0, share, MIX_RUN)]
        left -= share
    if left > 0:
        raise SystemExit(f"pages: the programs had {left} pages fewer than the {wanted} asked for")
    random.Random(1).shuffle(runs)
    return [page for run in runs for page in run]


def capture(path: Path, wanted: int) -> None:
    """Write *wanted* real pages to a file. Raises SystemExit if the programs had fewer."""
    with tempfile.TemporaryDirectory() as directory:
        pages = mix(capture_all(Path(directory)), wanted)
    with path.open("wb") as output:
        output.writelines(pages)


def main() -> None:
    """Capture as the command line asks."""
    args = parse_args()
    capture(args.output, args.pages)


if __name__ == "__main__":
    main()
