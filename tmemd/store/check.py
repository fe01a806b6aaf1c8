# SPDX-License-Identifier: BSD-3-Clause
"""An offline verifier of pool files, in pure Python: no code is shared with the page path that writes them.

Holds identity, control words, block states, index, slots, records, checksums and counters against each other, as
docs/pool-format.md describes them. What a crash may leave behind and the next attach puts right is a *note*; all else
is a *problem*. A pool in use changes while it is read: of what was found there, only that counts whose index words are
still the same afterwards.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import lz4.block
from crc32c import crc32c

from tmemd.store import pool, poolfile, poolindex
from tmemd.store.poolfile import CONTROL_OFFSET, PAGE, Identity, PoolError
from tmemd.store.poolindex import SPAN, Kind, State

RECORD: Final = struct.Struct("<IIHH")  # page, CRC, payload length, encoding
_SEALED: Final = struct.Struct("<IHH")  # what of it the CRC covers, before the payload
_PAIR: Final = struct.Struct("<QQ")
SLOT_ALIGN: Final = 16
SLOT_MIN: Final = 32
RAW, LZ4, SAME = range(3)
_CLEAN: Final = 1 << 5
_WRITING: Final = 1 << 6
_UNVERIFIED: Final = 1 << 7
_AHEAD: Final = 1 << 26
# Bits of a word that mean something, by its kind. Every word has room for a generation.
_MEANT: Final = {
    Kind.TMEM: 0xFFFFFFFFF << 28 | 0x7FFF << 12 | 0xF << 8 | 0x7F,
    Kind.FILE: 0xFFFFFFFF << 32 | 0xFFFFF << 12 | 0xF << 8 | 0xC7,
    Kind.ZERO: 0xF << 8 | 0x47,
    Kind.LOST: 0xF << 8 | 0x47,
    Kind.TORN: 0xF << 8 | 0x47,
}
_NEEDS_FILE: Final = {Kind.FILE, Kind.LOST, Kind.TORN}
_MANY: Final = 100  # problems remembered; the rest are only counted
_STEP: Final = 64  # spans or chunks of the index between two reports of progress

Progress = Callable[[str, int, int], None]


class Word(NamedTuple):
    """An index word, taken apart."""

    page: int
    value: int

    @property
    def kind(self) -> int:
        """Where the page is; may be no Kind at all."""
        return self.value & 7

    @property
    def encoding(self) -> int:
        """Of the record."""
        return self.value >> 3 & 3

    @property
    def length(self) -> int:
        """Bytes of payload."""
        return self.value >> 12 & 0x1FFF

    @property
    def location(self) -> int:
        """Where the record begins, in bytes of the data area."""
        return (self.value >> 28) * SLOT_ALIGN

    @property
    def slot_size(self) -> int:
        """Bytes of the slot the record lies in."""
        return max(SLOT_MIN, -(-(RECORD.size + self.length) // SLOT_ALIGN) * SLOT_ALIGN)


@dataclass
class Report:
    """What was found."""

    path: str
    served: bool = False
    problems: list[str] = field(default_factory=list)
    more_problems: int = 0  # beyond those listed
    notes: list[str] = field(default_factory=list)
    pages: dict[str, int] = field(default_factory=dict)  # by place
    spans: int = 0  # in use
    records: int = 0  # verified

    @property
    def ok(self) -> bool:
        """Whether there was no problem; notes do not count."""
        return not self.problems

    def problem(self, text: str) -> None:
        """Note a problem; of errors that name the pool, what they say of it."""
        text = text.removeprefix(f"{self.path}: ")
        if len(self.problems) < _MANY:
            self.problems.append(text)
        else:
            self.more_problems += 1


def check_pool(path: Path, progress: Progress = lambda *_: None) -> Report:
    """Read a pool file and say what is wrong with it; *progress* hears what is done, how much of it, and of how much.

    Raises PoolError when there is no such file, or it cannot be read.
    """
    report = Report(str(path))
    fd = pool.open_pool_file(path, writable=False)
    try:
        report.served = poolfile.is_locked(fd)
        identity = _check_header(fd, path, report)
        if identity:
            _Checker(fd, identity, report, progress).run()
    finally:
        os.close(fd)
    return report


def _check_header(fd: int, path: Path, report: Report) -> Identity | None:
    try:
        identity = poolfile.read_identity(fd, path)
        if identity is None:
            report.notes.append("unfinished: no plugin has written its identity yet")
            return None
        poolindex.check_layout(identity, path)
    except PoolError as error:
        report.problem(str(error))
        return None
    size = os.fstat(fd).st_size
    if size < identity.file_bytes:
        report.problem(f"the file is truncated: {size} bytes of {identity.file_bytes}")
    if path.name.endswith(poolfile.SUFFIX) and identity.name != path.name.removesuffix(poolfile.SUFFIX):
        report.problem(f"the file is named {path.name}, but is the pool of device {identity.name!r}")
    for number, name in enumerate(("target", "frozen", "demotion writes", "compression")):
        pair = poolindex.read_exactly(fd, _PAIR.size, CONTROL_OFFSET + number * _PAIR.size)
        value, complement = _PAIR.unpack(pair)
        if (value or complement) and value ^ complement != (1 << 64) - 1:
            report.notes.append(f"control page: the {name} is torn ({value:#x}, {complement:#x}) and ignored")
    return identity


def word_fault(word: Word, identity: Identity) -> str | None:
    """What is wrong with an index word by itself."""
    if word.kind not in _MEANT:
        return f"has a word of no kind ({word.value:#018x})"
    kind = Kind(word.kind)
    if word.value & ~_MEANT[kind]:
        return f"has a word with stray bits ({word.value:#018x})"
    if word.page >= identity.pages:
        return f"lies beyond the device's end, but is {kind.name.lower()}"
    if identity.is_ephemeral and kind is Kind.FILE and not word.value & (_WRITING | _UNVERIFIED):
        return "has a checksum, but its pool is ephemeral"
    if not identity.has_file and (kind in _NEEDS_FILE or (kind is Kind.TMEM and word.value & _CLEAN)):
        return "is said to be in a file, but the device has none"
    return _location_fault(word, identity) if kind is Kind.TMEM else None


def is_doubted(word: Word) -> bool:
    """Whether attaching does not believe this word of an ephemeral pool: the page is read from the source again."""
    if word.kind == Kind.TMEM:
        return not word.value & _CLEAN
    return word.kind != Kind.FILE or bool(word.value & _WRITING)


def _location_fault(word: Word, identity: Identity) -> str | None:
    lengths = {RAW: (PAGE, PAGE), LZ4: (1, PAGE - 1), SAME: (8, 8)}
    low, high = lengths.get(word.encoding, (1, 0))
    if not low <= word.length <= high:
        return f"has a record of encoding {word.encoding} and length {word.length}, which cannot be"
    if word.location + word.slot_size > identity.data_bytes:
        return f"has its record at {word.location}, beyond the end of memory"
    within = word.location % SPAN
    if within % word.slot_size or within + word.slot_size > SPAN:
        return f"has its record at {word.location}, where no slot of {word.slot_size} bytes begins"
    return None


def record_fault(word: Word, record: bytes) -> str | None:
    """What is wrong with the record that a word leads to; *record* is its slot."""
    page, crc, length, encoding = RECORD.unpack_from(record)
    if (page, length, encoding) != (word.page, word.length, word.encoding):
        return f"leads to a record of page {page}, length {length}, encoding {encoding}"
    payload = record[RECORD.size : RECORD.size + length]
    if crc32c(payload, crc32c(_SEALED.pack(page, length, encoding))) != crc:
        return "has a record with a wrong checksum"
    if encoding != LZ4:
        return None
    try:
        whole = len(lz4.block.decompress(payload, uncompressed_size=PAGE))
    except lz4.block.LZ4BlockError:
        return "has a record that does not decompress, though its checksum is right"
    return None if whole == PAGE else f"has a record of {whole} bytes, not of a page"


class _Checker:
    """One pass over the index, then one over the memory it leads to."""

    def __init__(self, fd: int, identity: Identity, report: Report, progress: Progress) -> None:
        self._fd = fd
        self._identity = identity
        self._report = report
        self._progress = progress
        self._states = b""
        self._counts: Counter[int] = Counter()
        self._doubted = 0  # pages
        self._payload = 0
        self._spans: dict[int, array[int]] = {}  # page and word, page and word, of each record in the span

    def run(self) -> None:
        self._check_states()
        self._check_index()
        self._check_spans()
        self._counts[Kind.NOWHERE] = self._identity.pages - sum(self._counts.values())
        self._report.pages = {kind.name.lower(): self._counts[kind] for kind in Kind}
        self._report.spans = len(self._spans)
        if not self._report.served:
            self._note_doubted()
            self._check_counters()

    def _problem(self, text: str, *words: Word) -> None:
        """Report it, unless the pool is in use and has moved on."""
        if not self._report.served or all(self._is_still(word) for word in words):
            self._report.problem(text)

    def _is_still(self, word: Word) -> bool:
        state = poolindex.read_exactly(self._fd, 1, poolfile.STATES_OFFSET + word.page // poolfile.BLOCK_PAGES)[0]
        offset = self._identity.index_offset + word.page * 8
        now = int.from_bytes(poolindex.read_exactly(self._fd, 8, offset), "little")
        # What is changed whenever a page is read.
        return state == State.INDEX and (now ^ word.value) & ~(_AHEAD | 0xF << 8) == 0

    def _check_states(self) -> None:
        self._states = poolindex.read_states(self._fd, self._identity)
        for block, state in enumerate(self._states):
            if state >= len(State):
                self._report.problem(f"block {block} is in no known state ({state})")
            elif state != State.INDEX:
                self._count_state(block, State(state))
        unused = self._identity.index_offset - poolfile.STATES_OFFSET - len(self._states)
        if unused < PAGE and any(poolindex.read_exactly(self._fd, unused, poolfile.STATES_OFFSET + len(self._states))):
            self._report.problem("there are states of blocks beyond the device's end")

    def _count_state(self, block: int, state: State) -> None:
        if not self._identity.has_file:
            self._report.problem(f"block {block} is said to be in a file, but the device has none")
        pages = min(poolfile.BLOCK_PAGES, self._identity.pages - block * poolfile.BLOCK_PAGES)
        kind = {State.FILE: Kind.FILE, State.LOST: Kind.LOST, State.ZERO: Kind.ZERO}[state]
        self._counts[kind] += pages
        self._doubted += pages if state is not State.FILE else 0

    def _check_index(self) -> None:
        total = poolindex.block_count(self._identity.size)
        for block, chunk in poolindex.index_chunks(self._fd, self._identity):
            for i in range(len(chunk) // PAGE):
                if block + i < total and self._states[block + i] == State.INDEX:
                    self._check_block(block + i, chunk[i * PAGE : (i + 1) * PAGE])
            self._progress("index", block, total)

    def _check_block(self, block: int, page: bytes) -> None:
        words = array("Q", page)
        if sys.byteorder == "big":
            words.byteswap()
        for i, value in enumerate(words):
            if value:
                self._check_word(Word(block * poolfile.BLOCK_PAGES + i, value))

    def _check_word(self, word: Word) -> None:
        fault = word_fault(word, self._identity)
        if fault:
            self._problem(f"page {word.page} {fault}", word)
            return
        self._counts[word.kind] += 1
        self._doubted += is_doubted(word)
        if word.kind == Kind.TMEM:
            self._payload += word.length
            self._spans.setdefault(word.location // SPAN, array("Q")).extend((word.page, word.value))

    def _check_spans(self) -> None:
        for done, span in enumerate(sorted(self._spans)):
            if done % _STEP == 0:
                self._progress("records", done, len(self._spans))
            flat = self._spans[span]
            words = sorted(map(Word, flat[::2], flat[1::2]), key=lambda word: word.location)
            self._check_slots(span, words)
            memory = poolindex.read_exactly(self._fd, SPAN, self._identity.data_offset + span * SPAN)
            for word in words:
                self._check_record(word, memory)

    def _check_slots(self, span: int, words: list[Word]) -> None:
        for one, other in pairwise(words):
            if one.slot_size != other.slot_size:
                sizes = f"{one.slot_size} and {other.slot_size} bytes (pages {one.page} and {other.page})"
                self._problem(f"span {span} has slots of {sizes}", one, other)
            elif one.location == other.location:
                self._problem(f"pages {one.page} and {other.page} have their record in the same slot", one, other)

    def _check_record(self, word: Word, memory: bytes) -> None:
        start = word.location % SPAN
        fault = record_fault(word, memory[start : start + word.slot_size])
        if fault:
            self._problem(f"page {word.page} {fault}", word)
        else:
            self._report.records += 1

    def _note_doubted(self) -> None:
        if self._identity.is_ephemeral and self._doubted:
            self._report.notes.append(f"{self._doubted} pages are read from the source again at the next attach")

    def _check_counters(self) -> None:
        try:
            counters = poolfile.read_counters(self._fd, self._report.path)
        except PoolError as error:
            self._report.problem(str(error))
            return
        self._check_memory(counters.used_bytes)
        found = {
            "pages_in_tmem": self._counts[Kind.TMEM],
            "pages_in_file": self._counts[Kind.FILE],
            "pages_lost": self._counts[Kind.LOST] + self._counts[Kind.TORN],
            "payload_bytes": self._payload,
        }
        for name, count in found.items():
            counted = getattr(counters, name)
            if counted != count:
                self._report.notes.append(f"counters say {name} is {counted}, the index {count}")

    def _check_memory(self, counted: int) -> None:
        """Memory that no record lies in is given back when a plugin attaches; until then it is only worth a note."""
        used = {span * SPAN // PAGE + page for span, flat in self._spans.items() for page in _pages_of(flat)}
        start, end = self._identity.data_offset, self._identity.data_offset + self._identity.data_bytes
        idle = 0
        for begin, stop in poolindex.allocated(self._fd, start, end):
            idle += sum(page not in used for page in range((begin - start) // PAGE, (stop - start) // PAGE))
        if idle:
            self._report.notes.append(f"{idle * PAGE} bytes of memory hold no record")
        taken = os.fstat(self._fd).st_blocks * 512
        if counted < taken:
            self._report.notes.append(f"counters say {counted} bytes are in use, the host gave {taken}")


def _pages_of(flat: array[int]) -> Iterator[int]:
    """The pages of a span that its records lie in."""
    for value in flat[1::2]:
        word = Word(0, value)
        start = word.location % SPAN
        yield from range(start // PAGE, (start + word.slot_size - 1) // PAGE + 1)
