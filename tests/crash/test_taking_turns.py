# SPDX-License-Identifier: BSD-3-Clause
"""A device goes from host to host while it is written to: what was acknowledged on one is there on the other."""

from __future__ import annotations

import errno
import random
import threading
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.content import PAGE, content
from tests.support.harness import MIB, Control
from tmemd.binding import _core
from tmemd.device.config import DeviceConfig
from tmemd.device.serve import ServedDevice, open_device
from tmemd.device.standby import StandbyDevice
from tmemd.store.requests import Request

SIZE = 64 * MIB
WRITERS = 4
PAGES = [*range(4), *range(2000, 2060), *range(SIZE // PAGE - 4, SIZE // PAGE)]
TURNS = 6


class Writer(threading.Thread):
    """Writes its own pages until it is refused, and knows what was acknowledged, and what it has tried last."""

    def __init__(self, core: _core.Device, pages: list[int], versions: dict[int, tuple[int, int]], seed: int) -> None:
        super().__init__()
        self._core, self._pages, self._versions = core, pages, versions
        self._rng = random.Random(seed)
        self.began = threading.Event()
        self.error: int | None = None

    def run(self) -> None:
        while True:
            page = self._rng.choice(self._pages)
            acknowledged, tried = self._versions[page]
            self._versions[page] = acknowledged, tried + 1
            try:
                _core.pwrite(self._core, content(page, tried + 1), page * PAGE, 0)
            except OSError as error:
                self.error = error.errno
                return
            self._versions[page] = tried + 1, tried + 1
            self.began.set()


class Host:
    """One of two, with a boot and pools of its own."""

    def __init__(self, base: Path, pools: Path, name: str, *, durable: bool) -> None:
        self.root, self.pools = base / name, pools / name
        boot = self.root / "proc/sys/kernel/random/boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text(f"{uuid.uuid4()}\n")
        self.pools.mkdir()
        self.config = DeviceConfig(
            "web", SIZE, base / "backing", 8 * MIB, self.pools, durable=durable, inside=True, lease=2.0, reserve=False,
            standby=True,
        )  # fmt: skip

    def hand_over(self) -> None:
        with Control(self.pools / "web.pool") as control:
            assert control.request(Request.HANDOVER) == 0

    def stand_by(self) -> StandbyDevice:
        return StandbyDevice(self.config, self.root, lambda _: None)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "handed over"])
def test_nothing_that_was_acknowledged_is_lost_when_a_device_goes_to_another_host(
    tmp_path: Path, pools: Path, durable: bool
) -> None:
    hosts = [Host(tmp_path, pools, name, durable=durable) for name in ("a", "b")]
    versions = dict.fromkeys(PAGES, (0, 0))
    with ExitStack() as closing:
        owner: ServedDevice | StandbyDevice = open_device(hosts[0].config, root=hosts[0].root)
        closing.callback(owner.close)
        owner.start()
        core = owner.core
        for turn in range(TURNS):
            assert isinstance(core, _core.Device)
            writers = [Writer(core, PAGES[n::WRITERS], versions, turn * WRITERS + n) for n in range(WRITERS)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.began.wait()
            if not durable:
                hosts[turn % 2].hand_over()
            successor = hosts[(turn + 1) % 2].stand_by()
            closing.callback(successor.close)
            successor.start()
            core = successor.taken()
            for writer in writers:
                writer.join()
                assert writer.error == errno.EIO
            for page, (acknowledged, tried) in versions.items():
                data = bytearray(PAGE)
                _core.pread(core, data, page * PAGE, 0)
                allowed = {content(page, version) if version else bytes(PAGE) for version in (acknowledged, tried)}
                assert bytes(data) in allowed, f"turn {turn}, page {page}"
                found = acknowledged if bytes(data) == content(page, acknowledged) else tried
                versions[page] = found, tried
            owner.close()
            owner = successor
