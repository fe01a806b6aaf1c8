"""nbdkit itself, with the extension built under AddressSanitizer and UBSan inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.crash.writers import Ledger, Writers
from tests.harness import MIB, Control, device
from tests.sanitizers import build
from tmemd import poolfile


@pytest.fixture(scope="module")
def wrapper() -> tuple[str, ...]:
    """A command that runs another with the instrumented extension."""
    return ("env", *(f"{key}={value}" for key, value in build().items()))


@pytest.mark.parametrize("flush", ["none", "durable"])
def test_a_loaded_server_is_clean_under_asan_and_ubsan(
    serve: Serve, pools: Path, disk: Path, wrapper: tuple[str, ...], flush: str
) -> None:
    server = serve(device("clean", pools, "8M", disk, "3M", flush=flush), wrapper=wrapper)
    assert "libasan" in Path(f"/proc/{server.pid}/maps").read_text()
    ledger = Ledger(2048)
    writers = Writers(server.socket, "", ledger, 1)
    with Control(pools / "clean.pool") as control:
        for op in (poolfile.Request.DEMOTE, poolfile.Request.DRAIN, poolfile.Request.SETTLE):
            ledger.wait_for(300, writers.stop)
            assert control.request(op, MIB) == 0
    writers.stop.set()
    writers.join()
    with server.client() as client:
        ledger.verify(client)
        client.flush()
    assert server.stop() == 0
    assert "Sanitizer" not in server.log()
    assert "runtime error" not in server.log()
