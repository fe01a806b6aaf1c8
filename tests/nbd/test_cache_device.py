# SPDX-License-Identifier: BSD-3-Clause
"""A cache device as its clients see it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import nbd
import pytest

from tests.support import exports
from tests.support.content import PAGE, compressible, incompressible
from tests.support.gate import Gate
from tests.support.harness import MIB, Serve, cache_device, counters, device, wait_until
from tests.support.leftovers import dying_with_us
from tests.support.sources import image, read_all
from tests.support.writers import pages

PAGES = 512


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return image(tmp_path / "image", PAGES)


def test_what_is_not_to_be_written_is_not(serve: Serve, pools: Path, source: Path) -> None:
    before = source.read_bytes()
    server = serve(cache_device("golden", pools, source, 8 * MIB))
    with server.client() as client:
        assert client.is_read_only()
        with pytest.raises(nbd.Error):
            client.pwrite(b"x", 0)
        with pytest.raises(nbd.Error):
            client.trim(PAGE, 0)
        with pytest.raises(nbd.Error):
            client.zero(PAGE, 0)
        assert b"".join(pages(client, PAGES)) == before
    assert source.read_bytes() == before
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("keys", "others"), [({}, True), ({"clients": "one"}, False), ({"write": "through"}, False)], ids=str
)
def test_many_read_but_one_writes(serve: Serve, pools: Path, source: Path, keys: dict[str, str], others: bool) -> None:
    server = serve(cache_device("golden", pools, source, 8 * MIB, **keys))
    script = (
        "import nbd, sys; client = nbd.NBD(); client.connect_unix(sys.argv[1]); sys.exit(client.pread(1, 0) == b'')"
    )
    with server.client() as client:
        assert client.can_multi_conn()
        other = subprocess.run([sys.executable, "-c", script, server.socket], capture_output=True, check=False)
    assert (other.returncode == 0) is others


def test_devices_share_a_server_and_a_source(serve: Serve, pools: Path, tmp_path: Path, source: Path) -> None:
    parameters = cache_device("one", pools, source, 8 * MIB) + cache_device("two", pools, source, 8 * MIB)
    server = serve(parameters + device("swap", pools, MIB, tmp_path / "backing", 8 * MIB))
    found: dict[str, str] = {}
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(server.socket))
    handle.opt_list(lambda name, description: found.update({name: description}))
    handle.opt_abort()
    assert found == {"one": "tmem cache device", "two": "tmem cache device", "swap": "tmem swap device"}
    for name in ("one", "two"):
        with server.client(name) as client:
            assert list(pages(client, PAGES)) == [compressible(page, 1) for page in range(PAGES)]


def test_who_writes_to_a_golden_image_does_so_in_a_layer_above(serve: Serve, pools: Path, source: Path) -> None:
    before = source.read_bytes()
    server = serve(cache_device("golden", pools, source, 8 * MIB), ("--filter=cow",))
    with server.client() as client:
        client.pwrite(incompressible(7, 2), 7 * PAGE)
        client.pwrite(b"part", 9 * PAGE + 100)
        client.trim(PAGE, 11 * PAGE)
        client.flush()
        found = b"".join(pages(client, PAGES))
    expected = bytearray(before)
    expected[7 * PAGE : 8 * PAGE] = incompressible(7, 2)
    expected[9 * PAGE + 100 : 9 * PAGE + 104] = b"part"
    expected[11 * PAGE : 12 * PAGE] = bytes(PAGE)
    assert found == expected
    assert source.read_bytes() == before


def status(client: nbd.NBD) -> list[tuple[int, int]]:
    """Pages and flags of each extent."""
    found: list[tuple[int, int]] = []

    def extent(_name: str, _offset: int, entries: list[int], _error: object) -> None:
        found.extend((length // PAGE, flags) for length, flags in zip(entries[::2], entries[1::2], strict=True))

    while (done := sum(n for n, _ in found)) < PAGES:
        client.block_status((PAGES - done) * PAGE, done * PAGE, extent)
    return found


def test_block_status_says_zeros_only_of_zeros(serve: Serve, pools: Path, source: Path) -> None:
    with source.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(32 * PAGE), 64 * PAGE)
    server = serve(cache_device("golden", pools, source, 8 * MIB, write="through"))
    with server.client() as client:
        assert status(client) == [(PAGES, 0)], "nobody has looked"
        client.pread(PAGES * PAGE, 0)
        zeros = nbd.STATE_ZERO | nbd.STATE_HOLE
        wait_until(lambda: status(client) == [(64, 0), (32, zeros), (PAGES - 96, 0)], "zeros to be found")
        client.pwrite(compressible(70, 2), 70 * PAGE)
        client.trim(PAGE, 2 * PAGE)
        expected = [(2, 0), (1, zeros), (61, 0), (6, zeros), (1, 0), (25, zeros), (PAGES - 96, 0)]
        assert status(client) == expected


def test_what_is_trimmed_is_zeros_in_the_source_too(serve: Serve, pools: Path, source: Path) -> None:
    server = serve(cache_device("golden", pools, source, 8 * MIB, write="through"))
    read_all(server, pools / "golden.pool", PAGES)
    with server.client() as client:
        client.trim(100 * PAGE, 100 * PAGE)
        client.zero(PAGE + 100, 300 * PAGE + 50)
        for _ in range(2):
            assert client.pread(PAGES * PAGE, 0) == source.read_bytes()
    found = source.read_bytes()
    assert not any(found[100 * PAGE : 200 * PAGE])
    assert not any(found[300 * PAGE + 50 : 301 * PAGE + 150])
    assert found[200 * PAGE : 300 * PAGE] == b"".join(compressible(page, 1) for page in range(200, 300))
    assert found[300 * PAGE :][:50] == compressible(300, 1)[:50]


def test_a_write_is_in_the_source_before_it_is_acknowledged(
    serve: Serve, pools: Path, tmp_path: Path, source: Path
) -> None:
    gate = Gate(tmp_path, source)
    server = serve(cache_device("golden", pools, source, 8 * MIB, write="through"), wrapper=gate.wrapper)
    read_all(server, pools / "golden.pool", PAGES)
    new = incompressible(7, 2)
    with server.client() as client, server.client() as reader:
        with gate.closed("done"):
            cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(new)), 7 * PAGE)
            while client.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
                client.poll(-1)
            gate.wait_for(1, "the write to be done")
            assert not client.aio_command_completed(cookie)
            assert reader.pread(PAGE, 8 * PAGE) == compressible(8, 1), "what is in tmem waits for no disk"
        while not client.aio_command_completed(cookie):
            client.poll(-1)
        with source.open("rb") as file:
            assert os.pread(file.fileno(), PAGE, 7 * PAGE) == new
        assert reader.pread(PAGE, 7 * PAGE) == new
        with gate.closed("nothing"):
            client.pwrite(new, 9 * PAGE)
            assert gate.calls("fdatasync") == []
            client.flush()
            assert len(gate.calls("fdatasync")) == 1
            client.pwrite(new, 10 * PAGE, nbd.CMD_FLAG_FUA)
            assert len(gate.calls("fdatasync")) == 2


READER = """
import collections, mmap, random, sys, threading
import nbd

socket, path, seed, clients, requests = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
with open(path, "rb") as file:
    image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
wrong = []

def check(client, at, buffer, cookie):
    while not client.aio_command_completed(cookie):
        client.poll(-1)
    if buffer.to_bytearray() != image[at : at + len(buffer)]:
        wrong.append(at)

def read(client, rng, length, depth):
    at, under_way = rng.randrange(0, len(image), length), collections.deque()
    for _ in range(requests * 4096 // length * depth):
        at = (at + length) % len(image) if depth > 1 else rng.randrange(0, len(image), length)
        buffer = nbd.Buffer(length)
        under_way.append((at, buffer, client.aio_pread(buffer, at)))
        if len(under_way) == depth:
            check(client, *under_way.popleft())
    for request in under_way:
        check(client, *request)

def run(number):
    client = nbd.NBD()
    client.connect_unix(socket)
    read(client, random.Random(number), *((131072, 4) if number % 2 else (4096, 1)))
    client.shutdown()

threads = [threading.Thread(target=run, args=(seed + n,)) for n in range(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("clients done", wrong, flush=True)
"""


@pytest.fixture
def big_source(disks: Path) -> Path:
    """Far more than its pool may take."""
    return image(disks / "image", 16384)


@pytest.mark.slow
def test_fifty_clients_read_ahead_or_at_random_at_once(serve: Serve, pools: Path, big_source: Path) -> None:
    server = serve(cache_device("golden", pools, big_source, 6 * MIB))
    peak = {"anonymous": 0, "files": 0, "pools": 0}
    with ExitStack() as stack:
        command = [sys.executable, "-c", READER, str(server.socket), str(big_source)]
        readers = [
            stack.enter_context(
                subprocess.Popen(
                    dying_with_us([*command, str(1000 * n), "10", "2000"]), stdout=subprocess.PIPE, text=True
                )
            )
            for n in range(5)
        ]
        while any(reader.poll() is None for reader in readers):
            peak = max(peak, exports.memory(server.pid, pools), key=exports.beside_pools)
            time.sleep(0.05)
        assert [reader.communicate()[0] for reader in readers] == ["clients done []\n"] * 5
    now = counters(pools / "golden.pool")
    assert now.gets > 1000
    assert now.demotions > 1000, "they take turns in tmem"
    assert (now.bad_checksums, now.io_errors) == (0, 0)
    print({kind: round(nbytes / MIB, 1) for kind, nbytes in peak.items()})
    assert exports.beside_pools(peak) < 150 * MIB
