# SPDX-License-Identifier: BSD-3-Clause
"""Recordings: the samples of all pools over time, which `tmemctl simulate` replays through every policy.

JSON lines, compressed where the name ends in .gz or .xz: a header, then records, each of all pools at one moment.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

import msgspec

from tmemd.protocol import PoolStatus
from tmemd.settings import MAX_WEIGHT
from tmemd.store.poolfile import GENERATIONS, PoolError, is_name
from tmemd.store.sample import NO_AGES, PoolSample

VERSION: Final = 1
_MAX_LINE: Final = 16 << 20
_MAX_NUMBER: Final = 1 << 62


class RecordingError(PoolError):
    """A recording cannot be written or read; the message names the file and, where there is one, the line."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    format: Literal["tmemd recording"] = "tmemd recording"
    version: int = VERSION
    started: str  # ISO 8601
    interval: Annotated[float, msgspec.Meta(ge=0.001, le=86400)]  # seconds between two records, as far as that was kept
    policy: str  # that held while it was recorded; '' where there was no tmemd


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One pool at one moment; times in nanoseconds since the pool was made."""

    sample: PoolSample
    file_read_ns: int  # spent on reading pages from the file
    spill_ns: int  # and on writing those that were refused


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Every line but the first."""

    at: Annotated[float, msgspec.Meta(ge=0, le=1e10)]  # seconds since the recording began
    budget_bytes: int  # what all targets together may be; without a tmemd what they are
    pools: tuple[PoolRecord, ...]


class Recording(msgspec.Struct, frozen=True):
    """A whole recording."""

    header: Header
    records: tuple[Record, ...]

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.records[-1].at - self.records[0].at if self.records else 0.0


_header: Final = msgspec.json.Decoder(Header)
_record: Final = msgspec.json.Decoder(Record)


def new_header(interval: float, policy: str) -> Header:
    """A header for a recording that begins now."""
    return Header(started=datetime.now(UTC).isoformat(timespec="seconds"), interval=interval, policy=policy)


def pool_record(status: PoolStatus) -> PoolRecord:
    """What is recorded of a pool that was listed with its latencies and ages."""
    sample = PoolSample(
        name=status.name,
        weight=status.settings.weight,
        minimum_bytes=status.settings.minimum,
        cap_bytes=status.settings.cap,
        target_bytes=status.target_bytes,
        frozen=status.frozen,
        served=status.served,
        has_file=status.has_file,
        is_ephemeral=status.kind == "ephemeral",
        counters=status.counters,
        ages=status.ages or NO_AGES,
    )
    latencies = status.latencies
    return PoolRecord(
        sample=sample,
        file_read_ns=latencies.file_read.sum_ns if latencies else 0,
        spill_ns=latencies.spill.sum_ns if latencies else 0,
    )


def _open(path: Path, mode: Literal["rb", "xb"]) -> IO[bytes]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, mode)  # type: ignore[no-any-return]


class Writer:
    """Writes a new recording; use it in a with block, so that the file has its end."""

    def __init__(self, path: Path, header: Header) -> None:
        """Create *path*. Raises RecordingError, also when it is there already."""
        self._path = path
        with self._errors():
            self._file = _open(path, "xb")
            self._file.write(msgspec.json.encode(header) + b"\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with self._errors():
            self._file.close()

    def add(self, record: Record) -> None:
        """Append a record. Raises RecordingError."""
        with self._errors():
            self._file.write(msgspec.json.encode(record) + b"\n")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordingError(f"{self._path}: {error.strerror or error}") from None


def read(path: Path) -> Recording:
    """Read a recording and check everything in it. Raises RecordingError."""
    header, records = None, []
    last = -1.0
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            if header is None:
                header = _header.decode(line)
                continue
            record = _record.decode(line)
            check(record)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            what = "this is no tmemd recording" if number == 1 else str(error)
            raise RecordingError(f"{where}: {what}") from None
        if header.version != VERSION:
            raise RecordingError(f"{path}: recording format version {header.version}, this tmemd reads {VERSION}")
        if record.at <= last:
            raise RecordingError(f"{where}: time does not go on from {last} s to {record.at} s")
        last = record.at
        records.append(record)
    if header is None:
        raise RecordingError(f"{path}: this is no tmemd recording: it is empty")
    return Recording(header, tuple(records))


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path, "rb") as file:
            while line := file.readline(_MAX_LINE):
                number += 1
                if not line.endswith(b"\n"):
                    raise EOFError
                yield line
    except EOFError:
        raise RecordingError(f"{path}: the recording is truncated: it ends in the middle of line {number}") from None
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise RecordingError(f"{path}: damaged behind line {number}: {error}") from None
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror or error}") from None


def check(record: Record) -> None:
    """Raise ValueError for a record with numbers that no pool has."""
    names = set()
    numbers = [record.budget_bytes]
    for pool in record.pools:
        sample, ages = pool.sample, pool.sample.ages
        if not is_name(sample.name) or sample.name in names:
            raise ValueError(f"{sample.name!r} is no name of a pool of its own")
        if not 1 <= sample.weight <= MAX_WEIGHT:
            raise ValueError(f"{sample.name}: a weight of {sample.weight} is not from 1 to {MAX_WEIGHT}")
        names.add(sample.name)
        for counts in (ages.gets, ages.file_reads, ages.freed, ages.stored_bytes, ages.raw_bytes, ages.in_file_pages):
            if len(counts) != GENERATIONS:
                raise ValueError(f"{sample.name}: {len(counts)} ages, not {GENERATIONS}")
            numbers += counts
        numbers += [sample.minimum_bytes, sample.target_bytes, sample.cap_bytes or 0, ages.published, ages.generation]
        numbers += [pool.file_read_ns, pool.spill_ns, *msgspec.structs.astuple(sample.counters)]
    wrong = next((number for number in numbers if not 0 <= number <= _MAX_NUMBER), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is no number that a pool can have")
