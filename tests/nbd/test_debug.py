# SPDX-License-Identifier: BSD-3-Clause
"""What `nbdkit -v` shows of a device: what was found when it was opened, its targets, its rounds of demotion."""

from __future__ import annotations

from pathlib import Path

from tests.support.content import PAGE, compressible
from tests.support.harness import MIB, Control, Serve, counters, device, wait_until


def test_verbose_nbdkit_shows_opening_targets_and_demotion(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("seen", pools, 2048 * PAGE, disk, 8 * MIB), options=("-v",))
    pool = pools / "seen.pool"
    assert f"debug: seen: {disk}: new" in server.log()
    assert f"debug: seen: {pool}: made a pool of epoch 1" in server.log()
    with server.client() as client:
        for page in range(2048):
            client.pwrite(compressible(page, 1), page * PAGE)
    with Control(pool) as control:
        control.target(2 * MIB)
        wait_until(lambda: counters(pool).used_bytes <= 2 * MIB, "the target to be kept")
    wait_until(lambda: "debug: seen: demotion: " in server.log(), "word of the demotion")
    assert "debug: seen: target: 2.00M, of which " in server.log()
    asked = next(line for line in server.log().splitlines() if "debug: seen: demotion: " in line)
    assert " asked, " in asked
    assert " given back; pages of age 0 and older" in asked
    server.kill()
    server.start()
    assert f"debug: seen: {disk}: with bitmap {disk}.map of epoch 1" in server.log()
    assert f"debug: seen: {pool}: adopted the pool of epoch 1 with " in server.log()


def test_quiet_nbdkit_shows_nothing(serve: Serve, pools: Path, disk: Path) -> None:
    server = serve(device("quiet", pools, 512 * PAGE, disk, 8 * MIB))
    assert server.log() == ""
