# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import asyncio
import errno
import http.client
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.support import fakes
from tests.support.harness import wait_until
from tests.support.scrape import free_port, get, parsed, samples, value
from tests.support.statuses import HOST, status
from tmemd.daemon import metricserver
from tmemd.daemon.metrics import Snapshot, exposition
from tmemd.daemon.metricserver import MetricsServer
from tmemd.daemon.start import main
from tmemd.daemonconfig import Address
from tmemd.settings import PoolSettings
from tmemd.store import poolfile
from tmemd.store.poolfile import Counters, Latencies

MIB = fakes.MIB


# What is told


def test_every_counter_of_a_pool_is_told() -> None:
    numbers = {field: 1000 + n for n, field in enumerate(Counters.__struct_fields__)}
    pool = status("web")
    pool = msgspec.structs.replace(pool, counters=Counters(**numbers))
    told = set(samples(exposition(Snapshot([pool]))).values())
    not_told = {field for field, number in numbers.items() if number not in told}
    assert not_told == {"minimum_bytes", "pid", "sync_failed", "fenced_at", "prefetching"}


def test_a_failed_sync_is_told() -> None:
    web = status("web")
    failed = msgspec.structs.replace(web, name="bad", counters=msgspec.structs.replace(web.counters, sync_failed=1))
    found = samples(exposition(Snapshot([web, failed])))
    assert [value(found, "tmemd_pool_sync_failed", pool=name) for name in ("web", "bad")] == [0, 1]


def test_a_lease_that_is_over_is_told() -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ends = {"none": 0, "over": now, "held": now + 10**12}
    pools = [
        msgspec.structs.replace(status(name), counters=msgspec.structs.replace(status(name).counters, fenced_at=end))
        for name, end in ends.items()
    ]
    found = samples(exposition(Snapshot(pools)))
    assert [value(found, "tmemd_pool_fenced", pool=name) for name in ends] == [0, 1, 0]


def test_the_kind_of_a_pool_is_told() -> None:
    golden = msgspec.structs.replace(status("golden", puts=1 << 20), kind="ephemeral", source="/images/golden")
    found = samples(exposition(Snapshot([golden])))
    assert value(found, "tmemd_pool_info", pool="golden", kind="ephemeral", source="/images/golden") == 1
    assert value(found, "tmemd_pool_never_trims", pool="golden") == 0


def test_numbers_have_names_units_and_labels() -> None:
    settings = PoolSettings(weight=250, cap=96 * MIB, minimum=8 * MIB, compression=False)
    pool = status("web", used_bytes=5 * MIB, puts=17, puts_refused=2, pages_in_file=3, reads=4, trims=9)
    pool = msgspec.structs.replace(pool, settings=settings, frozen=True, served=False, freeable_bytes=MIB)
    found = samples(exposition(Snapshot([pool, status("db", puts=1 << 20)], HOST)))
    for name, number in {
        "used_bytes": 5 * MIB, "target_bytes": 64 * MIB, "limit_bytes": fakes.LIMIT, "freeable_bytes": MIB,
        "puts_total": 17, "puts_refused_total": 2, "weight": 250, "cap_bytes": 96 * MIB, "minimum_bytes": 8 * MIB,
        "compression_enabled": 0, "frozen": 1, "served": 0, "never_trims": 0, "damaged": 0,
    }.items():  # fmt: skip
        assert value(found, f"tmemd_pool_{name}", pool="web") == number, name
    assert value(found, "tmemd_pool_pages", pool="web", place="file") == 3
    assert value(found, "tmemd_pool_requests_total", pool="web", type="trim") == 9
    assert value(found, "tmemd_pool_never_trims", pool="db") == 1
    assert value(found, "tmemd_pool_cap_bytes", pool="db") is None
    assert value(found, "tmemd_pools") == 2
    assert value(found, "tmemd_budget_bytes") == HOST.budget_bytes
    assert value(found, "tmemd_host_memory_available_bytes") == HOST.available_bytes
    assert value(found, "tmemd_host_memory_pressure_ratio", kind="some") == 0.012
    assert value(found, "tmemd_policy_info", policy="fair") == 1
    assert any(name == "tmemd_build_info" for name, _ in found)
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


def test_what_nobody_knows_is_absent() -> None:
    names = {name for name, _ in samples(exposition(Snapshot([])))}
    assert "tmemd_pools" in names
    assert not {name for name in names if "host" in name or "budget" in name}
    bare = msgspec.structs.replace(HOST, pressure_some=None, pressure_full=None, writes_left_bytes=None)
    names = {name for name, _ in samples(exposition(Snapshot([], bare)))}
    assert not {name for name in names if "pressure" in name or "writes_left" in name}
    assert "tmemd_host_memory_reserve_bytes" in names


def test_a_damaged_pool_resets_no_counter() -> None:
    found = samples(exposition(Snapshot([status("web", error="bad", puts=0)])))
    assert [(name, number) for (name, labels), number in found.items() if labels] == [
        ("tmemd_build_info", 1.0), ("tmemd_pool_damaged", 1.0), ("tmemd_pool_unfinished", 0.0),
        ("tmemd_pool_taken_bytes", 0.0),
    ]  # fmt: skip


def test_histograms_are_cumulative_and_lose_nothing() -> None:
    # In the first, one that is not told apart, one in the middle, and the last, which has no bound.
    put = fakes.histogram(0, 3, 20, poolfile.LATENCIES - 1, count=5, sum_ns=1_500_000_000)
    pool = status("web")
    pool = msgspec.structs.replace(pool, latencies=Latencies(put, *[fakes.histogram()] * 3))
    family = parsed(exposition(Snapshot([pool])))["tmemd_pool_operation_seconds"]
    of_put = [sample for sample in family.samples if sample.labels.get("op") == "put"]
    buckets = {sample.labels["le"]: sample.value for sample in of_put if sample.name.endswith("_bucket")}
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["5.12e-07"] == 5
    assert "7.68e-07" not in buckets
    assert buckets["1.024e-06"] == 10
    bound = poolfile.LATENCY_BOUNDS_NS[20] / 1e9
    assert [number for le, number in buckets.items() if float(le) < bound][-1] == 10
    assert buckets[str(bound)] == 15
    assert (buckets["1.073741824"], buckets["+Inf"]) == (15, 20)
    rest = {sample.name.rpartition("_")[2]: sample.value for sample in of_put if not sample.name.endswith("_bucket")}
    assert rest == {"count": 20, "sum": 1.5}


# How it is served: by a tmemd


@contextmanager
def tmemd(base: Path, *options: str) -> Iterator[tuple[fakes.Tmemd, int]]:
    port = free_port()
    with fakes.tmemd(base, f"--metrics=127.0.0.1:{port}", *options) as running:
        yield running, port


def test_a_scrape_tells_of_all_pools(base: Path) -> None:
    with (
        tmemd(base) as (running, port),
        fakes.pool(running.directory, "web", used_bytes=3 * MIB) as fd,
        fakes.pool(running.directory, "db"),
    ):
        (running.directory / "bad.pool").write_bytes(b"x" * 9999)
        (running.directory / "new.pool").write_bytes(bytes(8 * 4096))
        fakes.write_latencies(fd, get=fakes.histogram(9, sum_ns=5))
        code, text, kind = get(port)
        found = samples(text)
    assert (code, kind.split(";")[0]) == (200, "text/plain")
    assert value(found, "tmemd_pool_used_bytes", pool="web") == 3 * MIB
    assert value(found, "tmemd_pool_operation_seconds_count", pool="web", op="get") == 1
    assert value(found, "tmemd_pool_damaged", pool="bad") == 1
    assert value(found, "tmemd_pool_weight", pool="db") == 100
    assert value(found, "tmemd_pools") == 4
    assert [value(found, "tmemd_pool_unfinished", pool=name) for name in ("web", "bad", "new")] == [0, 0, 1]
    assert value(found, "tmemd_pool_taken_bytes", pool="new") == 8 * 4096
    assert value(found, "tmemd_pool_used_bytes", pool="new") is None, "it counts nothing yet"
    assert (value(found, "tmemd_host_memory_total_bytes") or 0) > 0
    ticks = value(found, "tmemd_governor_tick_seconds_count")
    assert ticks
    assert value(found, "tmemd_governor_tick_seconds_bucket", le="+Inf") == ticks
    assert not [name for name, _ in found if name.endswith("_created")]


def test_an_answer_is_not_older_than_the_last_change(base: Path) -> None:
    with tmemd(base) as (running, port), fakes.pool(running.directory, "web") as fd:
        for puts in range(1, 4):
            fakes.write_counters(fd, fakes.counters(puts=puts))
            wait_until(
                lambda puts=puts: value(samples(get(port)[1]), "tmemd_pool_puts_total", pool="web") == puts,  # type: ignore[misc]
                "the next count",
            )


def test_other_requests_get_a_clear_answer(base: Path) -> None:
    with tmemd(base) as (_, port):
        assert get(port, "/")[0] == 404
        assert get(port, "/metrics", "POST")[0] == 405
        code, body, _ = get(port, "/metrics?x=y", "HEAD")
        assert (code, body) == (200, b"")
        for rubbish in (b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET  HTTP/1.1 x\r\n\r\n",
                        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 5000):  # fmt: skip
            assert send(port, rubbish).startswith(b"HTTP/1.1 400 ")
        assert get(port)[0] == 200


def send(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        try:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(4096)
        except OSError as error:
            # It hung up in the middle of what is too long; whatever we do next says so.
            if error.errno not in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}:
                raise
            return b"HTTP/1.1 400 "


def test_many_connections_leave_tmemd_alone(base: Path) -> None:
    with tmemd(base) as (running, port), ExitStack() as connections:
        for _ in range(300):
            sock = connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            sock.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert running.client.pools() == []
        connections.close()
        wait_until(lambda: answers(port), "metrics to be served again")
        assert running.stop() == 0


def answers(port: int) -> bool:
    try:
        return get(port)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.mark.parametrize("address", ["", "9632", "localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999"])
def test_what_is_no_address_is_a_usage_error(address: str) -> None:
    with pytest.raises(SystemExit) as usage:
        main([f"--metrics={address}"])
    assert usage.value.code == 2


def test_the_configuration_says_where(base: Path) -> None:
    port = free_port()
    config = base / "tmemd.toml"
    config.write_text(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
    with fakes.tmemd(base, f"--config={config}") as running:
        assert get(port)[0] == 200
        other = free_port()
        config.write_text(f'[metrics]\nlisten = "127.0.0.1:{other}"\n')
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: answers(other), "metrics to be where they are wanted now")
        assert not answers(port)


def test_problems_are_told_in_words(base: Path) -> None:
    (base / "state").write_text("damaged")
    with tmemd(base) as (running, port):
        found = samples(get(port)[1])
        (problem,) = running.client.host().problems
        assert value(found, "tmemd_problem", what="settings", words=problem.words) == 1


# How it is served: what would take too long with a tmemd's own times


async def _serving(
    snapshot: Callable[[], Awaitable[Snapshot]], timeout: float, use: Callable[[int], Awaitable[None]]
) -> None:
    listener = metricserver.listen(Address(f"127.0.0.1:{free_port()}"))
    server = asyncio.create_task(MetricsServer(listener, snapshot, timeout=timeout).run())
    try:
        await use(listener.getsockname()[1])
    finally:
        server.cancel()
        with pytest.raises(asyncio.CancelledError):  # and nothing else, whatever it failed to answer
            await server


async def _nothing() -> Snapshot:
    return Snapshot([])


def test_who_reads_slowly_or_says_nothing_is_cut_off_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than the kernel keeps for a connection.
    monkeypatch.setattr(metricserver, "exposition", lambda _: bytes(32 * MIB))

    async def use(port: int) -> None:
        with socket.socket() as slow, socket.socket() as silent:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(20)
            slow.connect(("127.0.0.1", port))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            silent.settimeout(20)
            silent.connect(("127.0.0.1", port))
            code, body, _ = await asyncio.to_thread(get, port)
            assert (code, len(body)) == (200, 32 * MIB)
            assert await asyncio.to_thread(silent.recv, 1) == b""
            assert await asyncio.to_thread(read_all, slow) < 32 * MIB

    asyncio.run(_serving(_nothing, 1.0, use))


def test_connections_that_say_nothing_blind_nobody_and_are_bounded() -> None:
    async def use(port: int) -> None:
        with ExitStack() as connections:
            all_ = [
                connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                for _ in range(metricserver._CONNECTIONS + 8)
            ]
            assert (await asyncio.to_thread(get, port))[0] == 200
            for sock in all_[:9]:
                assert await asyncio.to_thread(sock.recv, 1) == b""
            for sock in all_[9:]:
                sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    sock.recv(1)

    asyncio.run(_serving(_nothing, 600, use))


def read_all(sock: socket.socket) -> int:
    """How many bytes come before the end, or the reset."""
    size = 0
    try:
        while data := sock.recv(1 << 20):
            size += len(data)
    except ConnectionResetError:
        pass
    return size


def test_many_who_ask_at_once_share_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = asked = 0
    parse = metricserver._parsed

    def counting(head: bytes) -> tuple[str, str]:
        nonlocal asked
        asked += 1
        return parse(head)

    monkeypatch.setattr(metricserver, "_parsed", counting)

    async def snapshot() -> Snapshot:
        nonlocal looks
        looks += 1
        while asked < 4:
            await asyncio.sleep(0.01)
        return Snapshot([status("web")])

    async def use(port: int) -> None:
        answers = await asyncio.gather(*(asyncio.to_thread(get, port) for _ in range(4)))
        assert len({body for _, body, _ in answers}) == 1

    asyncio.run(_serving(snapshot, 60, use))
    assert looks == 1


@pytest.mark.parametrize("error", [poolfile.PoolError("the directory is gone"), RuntimeError("a mistake of ours")])
def test_pools_that_cannot_be_looked_at_are_said_so(error: Exception) -> None:
    async def snapshot() -> Snapshot:
        raise error

    async def use(port: int) -> None:
        assert (await asyncio.to_thread(get, port))[0] == 503

    asyncio.run(_serving(snapshot, 5, use))
