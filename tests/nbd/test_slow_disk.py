"""Demotion to a disk that does not answer: reads go on, and memory returns once it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nbd

from tests.conftest import Serve
from tests.content import PAGE, compressible
from tests.harness import MIB, Control, counters, device, taken, wait_until

PAGES = range(2000, 6000)


def build_gate(directory: Path) -> Path:
    """Compile the shim into *directory*."""
    library, source = directory / "gate.so", Path(__file__).with_name("gate.c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return library


def read_all(client: nbd.NBD) -> list[int]:
    """Read every page, many at once; returns those that are wrong. AssertionError when an answer does not come."""
    buffers = {page: nbd.Buffer(PAGE) for page in PAGES}
    cookies = {page: client.aio_pread(buffer, page * PAGE) for page, buffer in buffers.items()}

    def answered() -> bool:
        while client.aio_in_flight() and client.poll(1):
            pass
        return not client.aio_in_flight()

    wait_until(answered, "reads")
    assert all(client.aio_command_completed(cookie) for cookie in cookies.values())
    return [page for page, buffer in buffers.items() if buffer.to_bytearray() != compressible(page, 1)]


def test_invariant_3_demotion_does_not_delay_reads(serve: Serve, pools: Path, disk: Path, tmp_path: Path) -> None:
    gate, reached = tmp_path / "gate", tmp_path / "gate.reached"
    wrapper = ("env", f"LD_PRELOAD={build_gate(tmp_path)}", f"GATED={disk}", f"GATE={gate}")
    server = serve(device("slow", pools, 64 * MIB, disk, 16 * MIB), wrapper=wrapper)
    pool = pools / "slow.pool"
    with server.client() as client, Control(pool) as control:
        for page in PAGES:
            client.pwrite(compressible(page, 1), page * PAGE)
        gate.touch()
        try:
            control.target(2 * MIB)
            wait_until(reached.exists, "a demotion")
            assert read_all(client) == []
            assert counters(pool).demotions == 0, "the gate has a gap"
        finally:
            gate.unlink()
        wait_until(lambda: taken(pool) <= 2 * MIB, "memory to return")
        assert read_all(client) == []
