# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest

from tests.support import fakes
from tmemd.binding import _core
from tmemd.cli import main
from tmemd.store import poolfile
from tmemd.store.check import Report, check_pool
from tmemd.store.poolfile import PoolError

MIB = fakes.MIB
TEXT = (b"All work and no play makes Jack a dull boy. " * 100)[:4096]
NOISE = random.Random(1).randbytes(4096)
SAME = b"\xaa" * 4096


def fill(filler: fakes.Filler) -> None:
    """Some of everything."""
    for page in range(0, 120, 4):
        filler.put(page, (NOISE[: page * 30] + TEXT)[:4096])
    for page in range(1, 120, 4):
        filler.put(page, NOISE)
    for page in range(2, 120, 4):
        filler.put(page, SAME)
    filler.word(3, 0xABCDEF01 << 32 | 7 << 8 | 2)
    filler.word(7, 3)
    filler.word(11, 4)
    filler.word(15, 1 << 7 | 2)
    filler.state(4, 1)
    filler.state(5, 3)
    filler.finish(pages_in_file=2 + 512, pages_lost=1)


def check(directory: Path) -> Report:
    return check_pool(directory / "web.pool")


def test_the_checksum_is_the_one_of_the_rfc() -> None:
    assert fakes.crc32c(b"123456789") == 0xE3069283


def test_the_page_paths_checksum_is_the_same_at_every_length() -> None:
    data = random.Random(1).randbytes(4096 + 8)
    for length in (0, 1, 7, 8, 9, 100, 383, 384, 385, 391, 392, 767, 768, 1151, 1152, 1500, 4095, 4096):
        for start in 0, 1, 5:
            assert _core.crc32c(data[start : start + length]) == fakes.crc32c(data[start : start + length])


def test_a_sound_pool_is_sound(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        fill(filler)
        blocks = os.fstat(filler.fd).st_blocks
        report = check(directory)
        assert (report.problems, report.notes) == ([], [])
        assert report.records == report.pages["tmem"] == 90
        assert report.pages == {"tmem": 90, "file": 514, "zero": 513, "lost": 1, "torn": 0, "nowhere": 16384 - 1118}
        assert os.fstat(filler.fd).st_blocks == blocks, "checking allocates nothing"


def test_an_empty_and_an_unfinished_pool_are_sound(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        filler.finish()
        assert check(directory).problems == []
    (directory / "new.pool").touch()
    report = check_pool(directory / "new.pool")
    assert report.ok
    assert "unfinished" in report.notes[0]


Damage = Callable[[fakes.Filler], object]


def flip(filler: fakes.Filler, offset: int) -> None:
    byte = os.pread(filler.fd, 1, offset)[0]
    os.pwrite(filler.fd, bytes([byte ^ 1]), offset)


def change_word(page: int, change: Callable[[int], int]) -> Damage:
    return lambda filler: filler.word(page, change(filler.read_word(page)))


def swap_words(filler: fakes.Filler) -> None:
    one, other = filler.read_word(2), filler.read_word(6)
    filler.word(2, other)
    filler.word(6, one)


def bad_lz4(filler: fakes.Filler) -> None:
    filler.put_record(9999, fakes.LZ4, b"\xff" * 50)


def short_lz4(filler: fakes.Filler) -> None:
    filler.put_record(9999, fakes.LZ4, lz4.block.compress(TEXT[:4000], store_size=False))


def mixed_classes(filler: fakes.Filler) -> None:
    made = filler.identity
    location = filler.slot(64)
    filler.slot(64)
    record = bytes(filler.identity.data_bytes and 32)
    os.pwrite(filler.fd, record, made.data_offset + location + 64)
    for page, at, length in ((9998, location, 50), (9999, location + 96, 20)):
        filler.word(page, at // 16 << 28 | length << 12 | fakes.LZ4 << 3 | 1)


DAMAGE: dict[str, tuple[Damage, str]] = {
    "identity": (lambda filler: flip(filler, 30), "checksum mismatch"),
    "magic": (lambda filler: flip(filler, 0), "not a tmem pool"),
    "truncated": (lambda filler: os.ftruncate(filler.fd, filler.identity.file_bytes - 1), "truncated"),
    "state": (lambda filler: filler.state(9, 4), "block 9 is in no known state"),
    "state beyond the end": (lambda filler: filler.state(32, 1), "beyond the device's end"),
    "kind": (lambda filler: filler.word(5000, 7), "page 5000 has a word of no kind"),
    "nowhere but not zero": (lambda filler: filler.word(5000, 8), "page 5000 has a word of no kind"),
    "stray bits": (change_word(2, lambda word: word | 1 << 7), "page 2 has a word with stray bits"),
    "stray bits of zero": (lambda filler: filler.word(7, 1 << 40 | 3), "page 7 has a word with stray bits"),
    "encoding": (change_word(2, lambda word: word | 3 << 3), "page 2 has a record of encoding 3"),
    "length": (change_word(2, lambda word: word + (1 << 12)), "page 2 has a record of encoding 2 and length 9"),
    "length 0": (change_word(0, lambda word: word & ~(0x1FFF << 12)), "length 0, which cannot be"),
    "beyond memory": (change_word(2, lambda word: word | 0xFFFFFFF << 36), "beyond the end of memory"),
    "between slots": (change_word(2, lambda word: word + (1 << 28)), "no slot of 32 bytes begins"),
    "record of another page": (swap_words, "page 2 leads to a record of page 6"),
    "same slot": (lambda filler: filler.word(9999, filler.read_word(2)), "in the same slot"),
    "mixed span": (mixed_classes, "slots of 64 and 32 bytes"),
    "bad lz4": (bad_lz4, "page 9999 has a record that does not decompress"),
    "short lz4": (short_lz4, "page 9999 has a record of 4000 bytes"),
    "lost counters": (lambda filler: os.ftruncate(filler.fd, 4096), "truncated"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(directory: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    with fakes.filled(directory) as filler:
        fill(filler)
        damage(filler)
        report = check(directory)
        assert message in "\n".join(report.problems)
        assert report.path not in "\n".join(report.problems)
        assert not report.ok


@pytest.mark.parametrize("page", [0, 1, 2, 60, 61, 116])
@pytest.mark.parametrize("byte", [0, 5, 8, 11, 12, 19])
def test_any_flipped_bit_of_a_record_is_found(directory: Path, page: int, byte: int) -> None:
    with fakes.filled(directory) as filler:
        fill(filler)
        flip(filler, filler.identity.data_offset + (filler.read_word(page) >> 28) * 16 + byte)
        problems = check(directory).problems
        assert len(problems) == 1
        assert problems[0].startswith(f"page {page} ")


def test_pages_beyond_the_end_are_found(directory: Path) -> None:
    with fakes.filled(directory, size=5 * MIB - 4096) as filler:
        filler.put(filler.identity.pages, TEXT)
        filler.finish()
        assert "beyond the device's end" in check(directory).problems[0]


@pytest.mark.parametrize("word", [2, 4, None])
def test_a_device_without_a_file_has_no_pages_there(directory: Path, word: int | None) -> None:
    with fakes.filled(directory, has_file=False) as filler:
        filler.put(1, TEXT)
        filler.finish()
        assert check(directory).ok
        filler.word(1, filler.read_word(1) | 1 << 5 if word is None else word)
        assert "the device has none" in check(directory).problems[0]


def test_an_ephemeral_pool_has_clean_pages_and_pages_in_its_source(directory: Path) -> None:
    with fakes.filled(directory, ephemeral=True) as filler:
        filler.put(1, TEXT)
        filler.word(1, filler.read_word(1) | 1 << 5)
        filler.word(2, 12345 << 32 | 3 << 8 | 1 << 7 | 2)
        filler.state(4, 1)
        filler.finish(pages_in_file=513)
        report = check(directory)
        assert (report.problems, report.notes) == ([], [])
        filler.word(2, 12345 << 32 | 3 << 8 | 2)
        assert "page 2 has a checksum, but its pool is ephemeral" in check(directory).problems[0]


@pytest.mark.parametrize("word", [3, 4, 5, 1 << 7 | 1 << 6 | 2])
def test_what_an_ephemeral_pool_reads_again_is_a_note(directory: Path, word: int) -> None:
    with fakes.filled(directory, ephemeral=True) as filler:
        filler.put(1, TEXT)  # not clean
        filler.word(2, word)
        filler.state(4, 2)
        filler.finish()
        report = check(directory)
        assert report.ok
        assert "514 pages are read from the source again at the next attach" in report.notes
        assert poolfile.lock(filler.fd)
        assert "source" not in "".join(check(directory).notes), "a write may be under way"


def test_what_the_next_attach_puts_right_is_only_a_note(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        fill(filler)
        os.pwrite(filler.fd, b"dead", filler.identity.data_offset + filler.identity.data_bytes - 4096)
        os.pwrite(filler.fd, b"\1\1\1\1", poolfile.CONTROL_OFFSET)
        filler.finish(pages_in_file=1, used_bytes=4096)
        report = check(directory)
        assert report.ok
        for word in ("torn", "pages_in_file is 1, the index 514", "4096 bytes of memory hold no record", "in use"):
            assert any(word in note for note in report.notes)


def test_problems_beyond_the_first_hundred_are_counted(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        for page in range(1000):
            filler.word(page, 7)
        report = check(directory)
        assert (len(report.problems), report.more_problems) == (100, 900)


def test_of_a_pool_in_use_only_what_stays_wrong_counts(directory: Path) -> None:
    with fakes.filled(directory) as filler:
        fill(filler)
        assert poolfile.lock(filler.fd)
        filler.word(5000, 7)
        flip(filler, filler.identity.data_offset + (filler.read_word(2) >> 28) * 16)
        assert len(check(directory).problems) == 2

        def move_on(what: str, *_: int) -> None:
            if what == "records":
                filler.word(2, 0)

        report = check_pool(directory / "web.pool", move_on)
        assert report.served
        assert [problem.split(" has ")[0] for problem in report.problems] == ["page 5000"]


def test_the_command_says_it_by_its_exit_status(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fakes.filled(directory) as filler:
        fill(filler)
        where = f"--pools={directory}"
        assert main(["check", "web", where]) == 0
        assert main(["check", f"{directory}/web.pool", "--json"]) == 0
        filler.finish(pages_in_file=0)
        assert main(["check", "web", where]) == 0
        assert main(["check", "web", where, "--strict"]) == 1
        flip(filler, 40)
        assert main(["check", "web", where]) == 1
        assert main(["check", "nothing", where]) == 1
        assert main(["check", "../web", where]) == 1
    assert "checksum mismatch" in capsys.readouterr().out


def test_no_file_is_an_error(directory: Path) -> None:
    with pytest.raises(PoolError, match="no pool"):
        check(directory)
