# SPDX-License-Identifier: BSD-3-Clause
"""The C core without Python, under the sanitizers: no warning, no wrong page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import ADDRESS, THREAD, Build, builder, run


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles programs of this directory with the core."""
    return builder(tmp_path_factory.mktemp("core"), Path(__file__).parent, ["core"])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((THREAD, "10000"), id="thread"),
        pytest.param((ADDRESS, "60000"), id="address,undefined"),
    ],
)
def stress(request: pytest.FixtureRequest, build: Build) -> tuple[str, str]:
    """The stress program, instrumented, and how many operations each thread does in a few seconds."""
    sanitizers, operations = request.param
    return build("stress", sanitizers), operations


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["file", "durable", "handover", "far", "ram", "cache"])
def test_invariants_3_and_5_threads_on_overlapping_pages_under_sanitizers(stress: tuple[str, str], mode: str) -> None:
    run([*stress, "1", mode])


@pytest.mark.parametrize(
    ("program", "options"),
    [
        pytest.param("promotion", ["-Wl,--wrap=unlock_io"], id="promotion neither waits nor brings back what is old"),
        pytest.param("refusal", [], id="a full pool does not compress what it refuses"),
        pytest.param("drained", ["-Wl,--wrap=lock_io"], id="a drain clears the bit where a write has failed"),
        pytest.param("partial", ["-Wl,--wrap=overwrite_locked"], id="a kill amid a partial overwrite leaves what was"),
        pytest.param(
            "copies",
            ["-Wl,--wrap=staging_take,--wrap=promote_put"],
            id="a copy is put only while it is what the source holds",
        ),
        pytest.param("eviction", [], id="a cache gives what a target asks for"),
        pytest.param("shortage", ["-Wl,--wrap=bounce_get"], id="what needs memory that cannot be had changes nothing"),
        pytest.param("failures", ["-Wl,--wrap=bounce_get,--wrap=bounce_put"], id="what fails half-way is an error"),
        pytest.param("bits", [], id="neighbouring bits set at the same time are both set"),
        pytest.param("records", [], id="a record that cannot be is no page"),
        pytest.param("fenced", [], id="beyond its fence a device does nothing"),
        pytest.param(
            "stretches",
            ["-Wl,--wrap=overwrite_run,--wrap=page_put"],
            id="what lies between pages on their way goes along",
        ),
        pytest.param("trend", [], id="trends are what a count of all distances finds"),
        pytest.param("buckets", [], id="latencies fall into the buckets they should"),
    ],
)
def test_the_core_by_itself(build: Build, program: str, options: list[str]) -> None:
    run([build(program, ADDRESS, *options)])


@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD])
def test_what_is_fetched_ahead_is_what_the_page_is(build: Build, sanitizers: str) -> None:
    run([build("prefetch", sanitizers, "-Wl,--wrap=clock_gettime,--wrap=pthread_cond_clockwait")])


@pytest.mark.parametrize("sanitizers", [THREAD, ADDRESS], ids=["thread", "address,undefined"])
def test_a_server_that_goes_and_comes_under_threads(build: Build, sanitizers: str, tmp_path: Path) -> None:
    run([build("away", sanitizers), str(tmp_path)])


@pytest.mark.parametrize("sanitizers", [THREAD, ADDRESS], ids=["thread", "address,undefined"])
def test_what_was_written_back_is_not_overtaken(build: Build, sanitizers: str, tmp_path: Path) -> None:
    run([build("written_back", sanitizers, "-Wl,--wrap=lock_io"), str(tmp_path)])
