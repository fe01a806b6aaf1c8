# SPDX-License-Identifier: BSD-3-Clause
"""Several devices in one nbdkit: export names choose among them and are never anything else."""

from __future__ import annotations

from pathlib import Path

import nbd
import pytest

from tests.support import exports
from tests.support.content import PAGE, content
from tests.support.harness import MIB, Serve, Server, device

NAMES = ["alpha", "beta", "gamma"]


@pytest.fixture
def server(serve: Serve, pools: Path, tmp_path: Path) -> Server:
    """Three devices of different sizes."""
    parameters: list[str] = []
    for n, name in enumerate(NAMES, 1):
        parameters += device(name, pools, f"{4 * n}M", tmp_path / f"{name}.file", "8M")
    return serve(parameters)


def test_each_export_is_its_own_device(server: Server) -> None:
    for n, name in enumerate(NAMES, 1):
        with server.client(name) as client:
            assert client.get_size() == 4 * n << 20
            client.pwrite(content(5, n) or b"", 5 * PAGE)
    for n, name in enumerate(NAMES, 1):
        with server.client(name) as client:
            assert client.pread(PAGE, 5 * PAGE) == content(5, n)


def test_exports_are_listed(server: Server) -> None:
    found: list[str] = []
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(server.socket))
    handle.opt_list(lambda name, _description: found.append(name))
    handle.opt_abort()
    assert sorted(found) == NAMES


@pytest.mark.parametrize(
    "name", ["delta", "../alpha", "/etc/passwd", "alpha.pool", "alpha/../beta", "x" * 4000, "%s%n"]
)
def test_unknown_export_is_refused_and_creates_nothing(server: Server, pools: Path, tmp_path: Path, name: str) -> None:
    before = sorted(pools.iterdir()), sorted(tmp_path.iterdir())
    with pytest.raises(nbd.Error):
        server.connect(name)
    assert (sorted(pools.iterdir()), sorted(tmp_path.iterdir())) == before
    complaint = f"open: error: there is no device {name[:64]!r}; this server has alpha, beta, gamma\n"
    assert server.log().endswith(complaint)
    assert "Traceback" not in server.log()
    with server.client("alpha") as client:
        assert client.pread(1, 0) == b"\0"


def test_the_empty_export_name_is_refused_when_there_is_a_choice(server: Server) -> None:
    with pytest.raises(nbd.Error):
        server.connect("")


def test_one_device_answers_to_its_name_and_to_the_empty_one(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("solo", pools, "4M", disk, "8M"))
    for name in ("", "solo"):
        with server.client(name) as client:
            assert client.get_size() == 4 << 20
    with pytest.raises(nbd.Error):
        server.connect("other")


@pytest.mark.slow
def test_a_hundred_exports_and_clients_take_less_than_100_mib_beside_the_pools() -> None:
    result = exports.measure(100, seconds=2)
    print(exports.render(result))
    assert result["peak_mib"]["beside_pools"] < 100


def test_more_files_than_the_usual_limit_are_served(pools: Path, tmp_path: Path) -> None:
    names = [f"guest{n}" for n in range(120)]
    usual = ("prlimit", "--nofile=1024:8192")
    with (
        exports.serving(tmp_path, pools, names, MIB, wrapper=usual) as server,
        exports.connected(server, names, MIB // PAGE, 1) as clients,
    ):
        exports.load(clients, 0.2)
        assert all(client.done for client in clients)
