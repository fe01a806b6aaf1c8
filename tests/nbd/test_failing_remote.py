# SPDX-License-Identifier: BSD-3-Clause
"""NBD servers that fail, as a device's remote store sees them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.harness import wait_until
from tests.support.leftovers import dying_with_us
from tmemd.binding import _core
from tmemd.device import remote
from tmemd.device.config import DeviceConfig, Uri
from tmemd.store.poolfile import PoolError

PAGE = 4096


@contextmanager
def nbdkit(run: Path, *words: str) -> Iterator[str]:
    """Serve what the *words* say for the length of a with block; yields its URI."""
    socket, pidfile = run / "other.sock", run / "other.pid"
    command = dying_with_us(["nbdkit", "-f", "-U", socket, "-P", pidfile, *words])
    with subprocess.Popen(command) as server:
        try:
            wait_until(lambda: pidfile.exists() or server.poll() is not None, "nbdkit to listen")
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.kill()


def test_a_server_that_refuses_everything_is_not_asked_without_end(tmp_path: Path) -> None:
    refusing = "--filter=error", "memory", "1M", "error=ESHUTDOWN", "error-rate=100%"
    with nbdkit(tmp_path, *refusing) as uri:
        asking = _core.Remote(uri, connections=1, timeout=3.0)
        asking.connect()
        with pytest.raises(TimeoutError):
            asking.read(0, PAGE)
        assert 2 <= asking.status.connects <= 8  # at once, and then after 0.1, 0.2, 0.4, 0.8 and 1.6 seconds


@pytest.mark.parametrize("scheme", ["nbds", "nbds+unix"])
def test_no_server_is_trusted_without_an_authority(tmp_path: Path, scheme: str) -> None:
    uri = Uri(f"{scheme}://localhost:1/?socket={tmp_path}/none&tls-certificates={tmp_path}")
    with pytest.raises(PoolError, match=f"no {tmp_path}/ca-cert.pem that this user can read"):
        remote.size_of(uri)
    with pytest.raises(PoolError, match="and without it any server would be trusted"):
        remote.reach(DeviceConfig("far", 4096, uri), uri, write=True)
    (tmp_path / "ca-cert.pem").touch()
    with pytest.raises(PoolError, match="nbd_aio_connect_uri"):
        remote.size_of(uri)
