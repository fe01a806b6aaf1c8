# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import fakes, harness
from tests.support.recordings import HEADER, pool, record
from tmemd.cli import main
from tmemd.simulation import recording
from tmemd.simulation.recording import RecordingError, Writer, read
from tmemd.store.poolfile import PoolError


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r.{suffix}"
    records = (record(0, pool(puts=1), pool("db")), record(0.5), record(1, pool(puts=2, cap_bytes=5, published=3)))
    with Writer(path, HEADER) as writer:
        for each in records:
            writer.add(each)
    assert read(path) == recording.Recording(HEADER, records)
    assert read(path).seconds == 1


def test_a_recording_is_not_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("precious")
    with pytest.raises(RecordingError, match="File exists"):
        Writer(tmp_path / "r", HEADER)
    assert (tmp_path / "r").read_text() == "precious"


def lines() -> list[dict[str, Any]]:
    made = [HEADER, record(0, pool()), record(1, pool())]
    return [json.loads(msgspec.json.encode(each)) for each in made]


def change(keys: tuple[Any, ...], value: Any) -> Callable[[list[Any]], None]:
    def apply(known: Any) -> None:
        for key in keys[:-1]:
            known = known[key]
        known[keys[-1]] = value

    return apply


SAMPLE = (2, "pools", 0, "sample")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change((0, "format"), "x"), "line 1: this is no tmemd recording"),
        (change((0, "version"), 2), "version 2, this tmemd reads 1"),
        (change((2, "at"), 0), "line 3: time does not go on"),
        (change((2, "at"), -1), "line 3: .*>= 0"),
        (change((2, "budget_bytes"), -1), "line 3: -1 is no number"),
        (change((2, "budget_bytes"), 1 << 80), "line 3: .* is no number"),
        (change((*SAMPLE, "counters", "puts"), 1 << 63), "line 3: .* is no number"),
        (change((*SAMPLE, "counters", "puts"), "1"), "line 3: Expected `int`"),
        (change((*SAMPLE, "ages", "freed"), [1, 2]), "line 3: web: 2 ages, not 16"),
        (change((*SAMPLE, "ages", "gets"), [-5, *[0] * 15]), "line 3: -5 is no number"),
        (change((*SAMPLE, "weight"), 0), "line 3: web: a weight of 0 is not from 1 to 10000"),
        (change((*SAMPLE, "name"), "../x"), "line 3: '../x' is no name"),
        (change((2, "pools"), [*lines()[2]["pools"]] * 2), "line 3: 'web' is no name of a pool of its own"),
    ],
)
def test_hostile_recordings_are_refused(tmp_path: Path, damage: Callable[[Any], None], complaint: str) -> None:
    known = lines()
    damage(known)
    path = tmp_path / "r"
    path.write_text("".join(json.dumps(line) + "\n" for line in known))
    with pytest.raises(RecordingError, match=complaint):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100 + b"\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n"])
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(RecordingError, match="this is no tmemd recording"):
        read(tmp_path / "r")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_truncated_recordings_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r.{suffix}"
    with Writer(path, HEADER) as writer:
        writer.add(record(0, pool()))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(RecordingError, match="truncated: it ends in the middle of line"):
        read(path)


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000)[:40] + b"\xff" * 40)
    with pytest.raises(RecordingError, match=r"r\.gz"):
        read(path)


def test_record_samples_the_pools_of_a_directory(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl.gz"
    with fakes.pool(directory, "web", puts=7):
        command = ["record", str(path), f"--pools={directory}", "--interval=0.01", "--duration=0.05", "--json"]
        assert main(command) == 0
    known = read(path)
    assert json.loads(capsys.readouterr().out)["samples"] == len(known.records) >= 1
    (one,) = known.records[-1].pools
    assert (one.sample.name, one.sample.counters.puts, known.header.policy) == ("web", 7, "")
    assert known.records[0].budget_bytes == one.sample.target_bytes == fakes.LIMIT


def test_a_recording_lasts_as_long_as_was_said(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "r"
    assert main(["record", str(path), f"--pools={directory}", "--interval=0.2", "--duration=0.2"]) == 0
    assert read(path).seconds >= 0.2


def test_a_recording_of_nothing_says_so(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r"
    with fakes.pool(directory, "web"):
        assert main(["record", str(path), f"--pools={directory}", "--interval=0.01", "--duration=0.02"]) == 0
    assert main(["simulate", str(path), "--policy=static"]) == 0
    assert "nobody swapped while this was recorded" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recording_that_is_interrupted_is_whole(directory: Path, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "tmemd.cli", "record", str(path), f"--pools={directory}", "--interval=0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        harness.wait_until(path.exists, "the recording to begin")
        os.kill(process.pid, number)
        output, _ = process.communicate()
    assert process.returncode == 0
    assert f"{len(read(path).records)} samples" in output


def test_record_says_what_is_wrong(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["record", "x", "--interval=nan"])
    assert main(["record", str(tmp_path / "none" / "x"), f"--pools={directory}"]) == 1
    assert main(["record", str(tmp_path / "x"), f"--socket={tmp_path}/none"]) == 1
    assert not (tmp_path / "x").exists()
    with pytest.raises(PoolError, match="No such file"):
        read(tmp_path / "x")
