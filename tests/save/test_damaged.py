# SPDX-License-Identifier: BSD-3-Clause
"""A save file that is damaged, cut off or put together wrongly is refused, with the page that it is about."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import leftovers, savefile
from tests.support.content import PAGE
from tests.support.saving import PAGES, SIZE, Host, fill, read
from tmemd.binding import _core
from tmemd.store.poolfile import PoolError
from tmemd.store.savefile import Reader, SaveHeader

FLIPS = 400


@pytest.fixture(scope="module")
def data() -> Iterator[bytes]:
    """A save file with records of every kind that a healthy device has."""
    with leftovers.directory("/dev/shm") as place:
        host = Host(place / "here", place / "web")
        with host.device() as core:
            fill(core)
        assert host.ctl("save", "web", str(place / "file")) == 0
        yield (place / "file").read_bytes()


def refusal(data: bytes) -> str:
    """Why it is refused."""
    with pytest.raises(PoolError) as refused:
        Reader(io.BytesIO(data), "FILE").run(None, lambda *_: None)
    return str(refused.value)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_it_is_read_to_its_end(data: bytes) -> None:
    counts = Reader(io.BytesIO(data), "FILE").run(None, lambda *_: None)
    assert counts.records == len(list(savefile.records(data)))


def test_a_flipped_bit_is_found_and_its_page_named(data: bytes) -> None:
    rng = random.Random(1)
    begin = savefile.header(data)[1]
    records = list(savefile.records(data))
    for _ in range(FLIPS):
        record = rng.choice(records)
        at = record.at + rng.randrange(12 + len(record.payload))
        said = refusal(flipped(data, at, rng.randrange(8)))
        if "FILE is truncated" in said:  # it says a length that goes beyond the end
            assert at < record.at + 12, (said, record.at, at)
        elif at >= record.at + 4:  # else the number of the page itself is damaged
            assert f"FILE is damaged at page {record.page}" in said, (said, record.at, at)
        else:
            assert "FILE is damaged at page" in said
    for at in (*range(begin), *range(len(data) - 40, len(data))):
        assert refusal(flipped(data, at, rng.randrange(8))).startswith("FILE")


def test_wherever_it_is_cut_off(data: bytes) -> None:
    for record in savefile.records(data):
        for end in (record.at, record.at + 1, record.at + 12, record.at + 12 + len(record.payload) - 1):
            assert re.search("truncated: it ends after .* bytes, before page", refusal(data[:end]))
    for end in range(savefile.header(data)[1]):
        assert "truncated: it ends inside its header" in refusal(data[:end])
    for end in range(len(data) - 40, len(data)):
        assert "truncated" in refusal(data[:end])
    assert "something follows its last record" in refusal(data + b"\0")


def test_records_that_are_missing_doubled_or_exchanged(data: bytes) -> None:
    records = list(savefile.records(data))
    ends = [*(record.at for record in records[1:]), len(data) - 40]
    one, two = (data[record.at : end] for record, end in zip(records[4:6], ends[4:6], strict=True))
    before, after = data[: records[4].at], data[ends[5] :]
    assert "records that are not those" in refusal(before + one + after)
    for wrong in (two + one, one + one + two):
        assert f"damaged at page {records[5].page + 1 if wrong[:8] == two[:8] else records[4].page + 1}" in refusal(
            before + wrong + after
        )


def sealed(page: int, encoding: int, payload: bytes) -> bytes:
    """A record as the document says it."""
    crc = crc32c(struct.pack("<IHH", page, len(payload), encoding) + payload)
    return struct.pack("<IIHH", page, crc, len(payload), encoding) + payload


NO_RECORDS = [
    sealed(PAGES, savefile.SAME, bytes(8)),
    sealed(0, savefile.SAME, bytes(9)),
    sealed(0, savefile.RAW, bytes(4095)),
    sealed(0, savefile.LZ4, b""),
    sealed(0, savefile.LZ4, bytes(4096)),
    sealed(0, savefile.RAW, bytes(4097)),
    sealed(0, 3, bytes(8)),
    sealed(0, savefile.ZERO, struct.pack("<I", PAGES + 1)),
    sealed(0, savefile.ZERO, struct.pack("<I", 0)),
    sealed(0, savefile.LOST, struct.pack("<Q", 1)),
    sealed(PAGES - 1, savefile.FILE, bytes(8)),
    sealed(0, savefile.FILE, b""),
    sealed(0, savefile.FILE, bytes(6)),
    sealed(1 << 31, savefile.UNVERIFIED, struct.pack("<I", 0xFFFFFFFF)),
]


@pytest.mark.parametrize("record", NO_RECORDS)
def test_what_is_sealed_and_cannot_be(data: bytes, record: bytes) -> None:
    begin = savefile.header(data)[1]
    assert "is damaged at page" in refusal(data[:begin] + record + data[begin:])


RECORDS = st.lists(
    st.tuples(
        st.integers(0, 40),  # pages further on
        st.sampled_from([*range(3), *range(16, 20), 3, 99]),  # encodings
        st.one_of(
            st.binary(max_size=64), st.binary(min_size=8, max_size=8), st.just(bytes(range(256)) * 16),
            st.integers(0, 2 * PAGES).map(lambda n: struct.pack("<I", n)),
        ),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=150, database=None)
@given(RECORDS, st.binary(max_size=80))
def test_whatever_is_sealed_is_refused_or_a_page(records: list[tuple[int, int, bytes]], rest: bytes) -> None:
    with leftovers.directory("/dev/shm") as place:
        host = Host(place / "here", place / "web")
        with host.device() as core:
            header = savefile_header(core)
            body, page = header, 0
            for further, encoding, payload in records:
                page += further
                body += sealed(page, encoding, payload)
                page += 1
            for device in (None, core):
                with pytest.raises(PoolError, match="FILE"):
                    Reader(io.BytesIO(body + rest), "FILE").run(device, lambda *_: None)
            for at in range(PAGES - 1):
                with suppress(OSError):  # what is no page after all is damaged, or lost
                    read(core, at * PAGE, PAGE)


def savefile_header(core: _core.Device) -> bytes:
    """One that any device's file can begin with."""
    return SaveHeader(
        name="web", size=core.size, uuid=UUID(int=1), epoch=1, changes=0, whole=True, written_by="0"
    ).pack()


@pytest.mark.parametrize("wrong", [b'"size":0,', b'"size":99999999999999999999,', b'"size":-1,', b'"name":"../x",'])
def test_a_header_that_cannot_be(data: bytes, wrong: bytes) -> None:
    length = struct.unpack_from("<I", data, 12)[0]
    key = wrong.partition(b":")[0]
    description = re.sub(re.escape(key) + rb":[^,]*,", wrong, data[16 : 16 + length])
    start = data[:12] + struct.pack("<I", len(description)) + description
    assert "nothing that can be understood" in refusal(start + struct.pack("<I", crc32c(start)))


def test_a_newer_version_is_refused_and_more_in_the_description_is_not(data: bytes) -> None:
    newer = data[:8] + struct.pack("<I", 2) + data[12:]
    assert "this tmemctl reads up to version 1" in refusal(newer)
    assert "is no save file" in refusal(b"x" * 1000)
    length = struct.unpack_from("<I", data, 12)[0]
    description = data[16 : 16 + length - 1] + b',"later":[1]}'
    start = data[:12] + struct.pack("<I", len(description)) + description
    assert Reader(io.BytesIO(start + struct.pack("<I", crc32c(start))), "FILE").header.name == "web"
    wrong = data[:16].replace(struct.pack("<I", length), struct.pack("<I", 2)) + b"{}"
    assert "nothing that can be understood" in refusal(wrong + struct.pack("<I", crc32c(wrong)))


def test_the_device_stays_as_it_is_and_by_a_pipe_is_half_restored(
    pools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    host = Host(pools / "here", tmp_path / "web")
    with host.device() as core:
        fill(core)
    assert host.ctl("save", "--whole", "web", str(tmp_path / "good")) == 0
    with host.device() as core:
        fill(core, seed=2)
        truth = read(core, 0, SIZE)
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").write_bytes(flipped(good, len(good) // 2, 0))
    assert host.ctl("restore", "--force", "web", str(tmp_path / "bad")) == 1
    assert re.search(r"bad is damaged at page \d+, in the record at byte \d+", capfd.readouterr().err)
    assert host.content() == truth
    command = [sys.executable, "-m", "tmemd.cli", "restore", "--force", f"--pools={host.pools}", "web", "-"]
    done = subprocess.run(command, input=(tmp_path / "bad").read_bytes(), capture_output=True, check=False)
    assert done.returncode == 1
    assert b"standard input is damaged at page" in done.stderr
    with pytest.raises(PoolError, match="has not ended: run 'tmemctl restore web FILE' again"):
        host.begin()
    assert host.ctl("restore", "web", str(tmp_path / "good")) == 0
