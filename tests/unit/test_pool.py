# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support import fakes
from tests.support.harness import waiting
from tmemd import operations, protocol
from tmemd.binding import _core
from tmemd.client import Client
from tmemd.device.config import DeviceConfig
from tmemd.device.parts import Parts
from tmemd.device.serve import open_device
from tmemd.store import poolfile, requests
from tmemd.store.directory import Pools
from tmemd.store.pool import Pool
from tmemd.store.poolfile import PoolError
from tmemd.store.requests import Choice, Queued, Request

MIB = fakes.MIB


def test_a_target_stays_between_minimum_and_limit(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web", used_bytes=8 * MIB) as fd:
        for target in (0, fakes.MINIMUM - 1, fakes.LIMIT + 1):
            with pytest.raises(PoolError, match="outside"):
                client.set_target("web", target)
        assert poolfile.read_control(fd).target is None
        for target in (fakes.MINIMUM, fakes.LIMIT, 2 * MIB):
            client.set_target("web", target)
            assert poolfile.read_control(fd).target == target == client.pool("web").target_bytes


def test_a_pool_that_was_made_and_is_not_open_yet_has_its_bounds(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(*_: object) -> NoReturn:
        client = Client.of_directory(directory)
        client.set_target("web", 2 * MIB)
        found.append((client.pool("web").counters.limit_bytes, client.pool("web").counters.minimum_bytes))
        raise PoolError("seen")

    monkeypatch.setattr(Parts, "open_core", look)
    with pytest.raises(PoolError, match="seen"):
        open_device(DeviceConfig("web", 64 * MIB, None, 8 * MIB, directory))
    assert found == [(8 * MIB, _core.layout(64 * MIB).minimum_bytes)]


def test_without_a_file_a_target_never_falls_below_use(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "ram", has_file=False, used_bytes=8 * MIB) as fd:
        with pytest.raises(PoolError, match="below its use"):
            client.set_target("ram", 8 * MIB - 1)
        client.set_target("ram", 8 * MIB)
        assert poolfile.read_control(fd).target == 8 * MIB


def test_the_effective_target_never_exceeds_the_limit(directory: Path) -> None:
    with fakes.pool(directory, "web") as fd:
        poolfile.write_target(fd, 2 * fakes.LIMIT)
        assert Client.of_directory(directory).pool("web").target_bytes == fakes.LIMIT


def test_freeze_and_thaw(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        for frozen in (True, False):
            client.set_frozen("web", frozen)
            assert poolfile.read_control(fd).frozen == frozen == client.pool("web").frozen


def test_one_pool_that_cannot_be_frozen_leaves_the_others_frozen(directory: Path) -> None:
    (directory / "a.pool").touch()
    with fakes.pool(directory, "b") as fd:
        with pytest.raises(PoolError, match="all pools were frozen but a"):
            Client.of_directory(directory).set_frozen(None, True)
        assert poolfile.read_control(fd).frozen


def test_changes_need_control_of_the_directory_and_reading_does_not(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd, closing(Pools(directory, keep=True)):
        with pytest.raises(PoolError, match="controls"):
            client.set_frozen("web", True)
        with pytest.raises(PoolError, match="controls"):
            Pools(directory, keep=True)
        assert not poolfile.read_control(fd).frozen
        assert [status.name for status in client.pools()] == ["web"]


def test_unfinished_pools_are_listed_as_such_and_cannot_be_changed(directory: Path) -> None:
    (directory / "new.pool").write_bytes(bytes(8192))
    client = Client.of_directory(directory)
    (status,) = client.pools()
    assert (status.unfinished, status.error, status.taken_bytes, status.counters.used_bytes) == (True, None, 8192, 8192)
    assert client.pool("new") == status
    changes: list[Callable[[str], object]] = [
        lambda name: client.set_target(name, MIB),
        lambda name: client.set_frozen(name, True),
    ]
    for change in changes:
        with pytest.raises(PoolError, match="unfinished"):
            change("new")
    client.destroy("new")
    assert list(directory.iterdir()) == []


def test_damaged_pools_are_listed_as_such(directory: Path) -> None:
    with fakes.pool(directory, "torn") as fd:
        os.pwrite(fd, b"\1", 50)
    with fakes.pool(directory, "short") as fd:
        os.ftruncate(fd, 4096 + 8)
    with fakes.pool(directory, "real"):
        (directory / "copy.pool").write_bytes((directory / "real.pool").read_bytes())
    (directory / "junk.pool").write_bytes(b"junk" * 3000)
    listed = {status.name: status.error for status in Client.of_directory(directory).pools()}
    assert listed["real"] is None
    assert "damaged" in (listed["torn"] or "")
    assert "truncated" in (listed["short"] or "")
    assert "device 'real'" in (listed["copy"] or "")
    assert "not a tmem pool" in (listed["junk"] or "")


def test_only_pool_files_count(directory: Path) -> None:
    outside = directory.parent / "outside.pool"
    (directory / "link.pool").symlink_to(outside)
    (directory / "folder.pool").mkdir()
    (directory / "-x.pool").touch()
    (directory / "web.json").touch()
    os.mkfifo(directory / "fifo.pool")
    client = Client.of_directory(directory)
    assert client.pools() == []
    for name in ("link", "folder", "fifo"):
        with pytest.raises(PoolError):
            client.destroy(name, lose_pages=True)
    assert not outside.exists()


def test_a_directory_that_is_not_there_is_an_error(directory: Path) -> None:
    with pytest.raises(PoolError, match="No such file"):
        Client.of_directory(directory / "nowhere").pools()


def test_destroy_refuses_what_is_served_or_would_lose_pages(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web", pages_in_tmem=3) as fd:
        assert poolfile.lock(fd)
        with pytest.raises(PoolError, match="served"):
            client.destroy("web", lose_pages=True)
    with pytest.raises(PoolError, match="3 pages"):
        client.destroy("web")
    with closing(Pool(directory / "web.pool")) as pool:
        assert not pool.is_served(), "a refused destroy keeps no lock"
    client.destroy("web", lose_pages=True)
    assert list(directory.iterdir()) == []


def test_work_is_asked_of_who_serves_the_pool(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd, fakes.pool(directory, "ram", has_file=False):
        with pytest.raises(PoolError, match="nobody serves"):
            client.ask("web", "drain")
        with pytest.raises(PoolError, match="no backing file"):
            client.ask("ram", "demote", 4096)
        assert waiting(fd) == []
        assert poolfile.lock(fd)
        assert client.ask("web", "demote", 4096, Choice(3, True)) == 1
        assert client.ask("web", "drain") == 2
        demote, drain = waiting(fd)
        assert demote == Queued(1, Request.DEMOTE, 4096, Choice(3, True))
        assert (drain.number, drain.op) == (2, Request.DRAIN)


def test_every_request_has_its_own_answer(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        assert poolfile.lock(fd)
        drain, compact = client.ask("web", "drain"), client.ask("web", "compact")
        requests.answer(fd, drain, errno.ENOSPC)
        assert [client.pool("web", request=number).answer for number in (drain, compact)] == [errno.ENOSPC, None]
        requests.answer(fd, compact, 0)
        assert [client.pool("web", request=number).answer for number in (drain, compact)] == [errno.ENOSPC, 0]
        assert client.pool("web").answer is None


def test_a_queue_that_is_full_says_so_and_keeps_what_it_has(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        assert poolfile.lock(fd)
        numbers = [client.ask("web", "compact") for _ in range(requests.SLOTS)]
        with pytest.raises(PoolError, match=f"pool web: {requests.SLOTS} requests are waiting"):
            client.ask("web", "drain")
        assert [queued.number for queued in waiting(fd)] == numbers
        requests.answer(fd, numbers[0], 0)
        assert client.ask("web", "drain") == numbers[-1] + 1


def test_an_answer_that_later_ones_have_replaced_is_known_to_be_gone(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        assert poolfile.lock(fd)
        first = client.ask("web", "drain")
        requests.answer(fd, first, errno.EIO)
        for _ in range(requests.SLOTS):
            requests.answer(fd, client.ask("web", "compact"), 0)
        with pytest.raises(PoolError, match=r"pool web: request 1 was carried out.* ask again"):
            client.pool("web", request=first)


@pytest.mark.parametrize("word", range(5))
def test_a_request_torn_in_any_word_was_never_made(directory: Path, word: int) -> None:
    slot = poolfile.CONTROL_OFFSET + poolfile.CONTROL_BYTES + 2 * 40
    with fakes.pool(directory, "web") as fd:
        for _ in range(2):
            requests.ask(fd, Request.DEMOTE, 4096)
        os.pwrite(fd, b"\7", slot + word * 8)
        assert [queued.number for queued in waiting(fd)] == [1]
        assert requests.ask(fd, Request.DRAIN) == 2
        assert [queued.op for queued in waiting(fd)] == [Request.DEMOTE, Request.DRAIN]


def test_a_number_that_was_answered_is_not_given_again(directory: Path) -> None:
    with fakes.pool(directory, "web") as fd:
        requests.answer(fd, requests.ask(fd, Request.COMPACT), 0)
        os.pwrite(fd, bytes(poolfile.PAGE), poolfile.CONTROL_OFFSET)
        assert requests.ask(fd, Request.DRAIN) == 2
        assert [queued.op for queued in waiting(fd)] == [Request.DRAIN]


def test_numbers_that_cannot_grow_are_ignored(directory: Path) -> None:
    last = (1 << 64) - 1
    body = struct.pack("<QQQQ", last, Request.DRAIN, 0, 0)
    with fakes.pool(directory, "web") as fd:
        slot = poolfile.CONTROL_OFFSET + poolfile.CONTROL_BYTES + last % requests.SLOTS * 40
        os.pwrite(fd, body + struct.pack("<Q", fakes.crc32c(body)), slot)
        assert requests.ask(fd, Request.COMPACT) == 1


def test_a_keeper_notices_replaced_files(directory: Path) -> None:
    with fakes.pool(directory, "web") as old, closing(Pools(directory, keep=True)) as keeper:
        assert keeper.adopt_all() == set()
        (directory / "web.pool").unlink()
        with fakes.pool(directory, "web") as new:
            with keeper.pool("web", control=True) as pool:
                pool.set_frozen(True)
            assert poolfile.read_control(new).frozen
            assert not poolfile.read_control(old).frozen


def test_a_keeper_whose_directory_is_replaced_makes_nothing_there_until_it_moves_in(directory: Path) -> None:
    place = directory / "pools"
    place.mkdir()
    with fakes.pool(place, "web") as fd, closing(Pools(place, keep=True)) as keeper:
        keeper.adopt_all()
        place.rename(directory / "away")
        for _ in range(2):
            with pytest.raises(PoolError, match="is not the directory that tmemd keeps pools in"):
                keeper.create("db", os.geteuid(), os.getegid())
            assert keeper.names() == ["web"]
            with keeper.pool("web", control=True) as pool:
                poolfile.write_target(pool.fd, 50 * MIB)
            assert poolfile.read_control(fd).target == 50 * MIB, "what is served from where it was goes on"
            assert keeper.adopt_all() == set()
            place.mkdir(exist_ok=True)
        assert list(place.iterdir()) == []
        keeper.follow_directory()
        keeper.create("db", os.geteuid(), os.getegid())
        keeper.adopt_all()
        assert keeper.names() == ["db"]
        with pytest.raises(PoolError, match="controls"):
            Pools(place, keep=True)
        Pools(directory / "away", keep=True).close()


def test_created_pools_belong_to_their_user_from_the_first_moment(directory: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to create files for another user")
    with closing(Pools(directory, keep=True)) as keeper:
        keeper.create("web", 12345, 54321)
        keeper.create("web", 12345, 54321)
        status = (directory / "web.pool").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12345, 54321, 0o600)
        with pytest.raises(PoolError, match="another user"):
            keeper.create("web", 0, 0)


def test_a_keeper_lets_go_of_pools_that_are_gone(directory: Path) -> None:
    def open_pools() -> int:
        links = (str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists())
        return sum(link.startswith(f"{directory}/") for link in links)

    with closing(Pools(directory, keep=True)) as keeper:
        for name in ("destroyed", "removed", "kept"):
            with fakes.pool(directory, name):
                pass
        keeper.adopt_all()
        assert open_pools() == 3
        keeper.destroy("destroyed", lose_pages=False)
        assert open_pools() == 2
        (directory / "removed.pool").unlink()
        keeper.adopt_all()
        assert open_pools() == 1


def test_an_owner_cannot_make_us_wait_with_a_lease(directory: Path) -> None:
    with fakes.pool(directory, "leased"), fakes.pool(directory, "web"):
        pass
    with (directory / "leased.pool").open("r+b") as file, fakes.leased(file.fileno()):
        client = Client.of_directory(directory)
        assert [(status.name, status.error is None) for status in client.pools()] == [("leased", False), ("web", True)]
        with pytest.raises(PoolError, match="its owner holds a lease on it"):
            client.pool("leased")  # who waits gets it, when the kernel breaks the lease after 45 seconds


def test_numbers_that_no_honest_plugin_counts_are_handed_on(directory: Path) -> None:
    with fakes.pool(directory, "web", puts=(1 << 64) - 1, limit_bytes=(1 << 64) - 1) as fd:
        poolfile.write_target(fd, (1 << 64) - 1)
        (status,) = Client.of_directory(directory).pools()
        answer = protocol.decode_answer(protocol.encode(protocol.Listed([status])))
        assert answer == protocol.Listed([status])
        assert status.counters.puts == status.target_bytes == (1 << 64) - 1


def test_latencies_and_ages_come_only_where_asked_for(directory: Path) -> None:
    client = Client.of_directory(directory)
    with fakes.pool(directory, "web") as fd:
        fakes.write_latencies(fd, spill=fakes.histogram(3, 46, sum_ns=7))
        (short,) = client.pools()
        assert (short.latencies, short.ages) == (None, None)
        (long,) = client.pools(long=True)
    assert long.latencies
    assert long.latencies.spill == fakes.histogram(46, 3, sum_ns=7)
    assert [histogram.count for histogram in (long.latencies.put, long.latencies.get)] == [0, 0]
    assert long.ages
    assert long.ages.published == 0


def test_who_is_refused_the_directory_keeps_no_descriptor_of_it(directory: Path) -> None:
    with closing(Pools(directory, keep=True)):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(PoolError, match="controls"):
            Pools(directory, keep=True)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("request_", [protocol.Attach("web", MIB, True, MIB), protocol.Host()], ids=["attach", "host"])
def test_what_only_tmemd_does_is_refused_without_one(directory: Path, request_: protocol.Request) -> None:
    with closing(Pools(directory)) as pools, pytest.raises(PoolError, match="only tmemd"):
        operations.perform(pools, request_)
