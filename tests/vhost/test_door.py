# SPDX-License-Identifier: BSD-3-Clause
"""The virtio door without Python, under the sanitizers, against front ends and guests that break its rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import ADDRESS, THREAD, Build, builder, run


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles programs of this directory with the core and the door."""
    return builder(tmp_path_factory.mktemp("vhost"), Path(__file__).parent, ["core", "vhost"])


GUEST = Path(__file__).with_name("guest.supp")
SANITIZERS = [pytest.param(ADDRESS, id="address,undefined"), pytest.param(THREAD, id="thread")]


@pytest.mark.parametrize("sanitizers", SANITIZERS)
@pytest.mark.parametrize(
    ("program", "options"),
    [
        pytest.param("rules", ["-Wl,--wrap=poll", "-Wl,--wrap=tm_may_wait"], id="who breaks a rule loses no more"),
        pytest.param("waiting", ["-Wl,--wrap=pthread_join"], id="a slow disk keeps up nobody else"),
        pytest.param("inflight", [], id="killed before any store it loses nothing and does nothing twice"),
    ],
)
def test_the_door_by_itself(build: Build, program: str, options: list[str], sanitizers: str) -> None:
    run([build(program, sanitizers, *options)], GUEST)


@pytest.mark.parametrize(
    ("sanitizers", "count", "mode"),
    [
        # What the guest itself does at the same time is a race, but none of ours.
        pytest.param(THREAD, 5000, "quiet", id="thread"),
        pytest.param(ADDRESS, 30000, "quiet", id="address,undefined"),
        pytest.param(ADDRESS, 30000, "scribble", id="address,undefined, memory that changes"),
    ],
)
def test_whatever_they_send_nobody_else_notices(build: Build, sanitizers: str, count: int, mode: str) -> None:
    run([build("fuzz", sanitizers, "-Wl,--wrap=poll"), str(count), "1", mode], GUEST)
