# SPDX-License-Identifier: BSD-3-Clause
"""What Python repeats of the pool file's layout is what the core's headers say, names and order included."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from tests.support.harness import ROOT
from tmemd.store import check, poolfile, poolindex
from tmemd.store.poolfile import Ages, Control, Counters, Doors, Histogram, Latencies, RemoteState
from tmemd.store.poolindex import Kind, State

HEADERS = "".join((ROOT / "tmemd/core" / name).read_text() for name in ("layout.h", "word.h"))
CODE = re.sub(r"/\*.*?\*/", "", HEADERS, flags=re.DOTALL)


def constants() -> dict[str, int]:
    """Every number that an enum or a plain #define gives a name to."""
    found = {name: int(value) for name, value in re.findall(r"#define (TM_\w+) (\d+)u\b", CODE)}
    for body in re.findall(r"enum(?: \w+)? \{(.*?)\};", CODE, re.DOTALL):
        for name, value in re.findall(r"(\w+) = ([^,}]+)", body):
            found[name] = int(eval(value.replace("/", "//"), {}, dict(found)))
    return found


def fields(struct: str) -> list[str]:
    """The names of its fields, all of them 64 bits or made of such, in their order."""
    found = re.search(rf"struct {struct} {{(.*?)\n}};", CODE, re.DOTALL)
    assert found, struct
    assert set(re.findall(r"\bu?int(?:\d+_t)?\b", found[1])) <= {"uint64_t"}
    return re.findall(r"(\w+)(?:\[\w+\])?[,;]", found[1])


def test_constants_are_those_of_the_header() -> None:
    known = {
        "TM_PAGE": poolfile.PAGE,
        "TM_BLOCK_PAGES": poolfile.BLOCK_PAGES,
        "TM_COUNTERS_OFFSET": poolfile.COUNTERS_OFFSET,
        "TM_CONTROL_OFFSET": poolfile.CONTROL_OFFSET,
        "TM_STATISTICS_OFFSET": poolfile.STATISTICS_OFFSET,
        "TM_STATES_OFFSET": poolfile.STATES_OFFSET,
        "TM_GENERATIONS": poolfile.GENERATIONS,
        "TM_LATENCIES": poolfile.LATENCIES,
        "TM_SPAN_BYTES": poolindex.SPAN,
        "TM_SLOT_ALIGN": check.SLOT_ALIGN,
        "TM_SLOT_MIN": check.SLOT_MIN,
        "TM_RECORD_HEADER": check.RECORD.size,
    }
    known |= {f"TM_STATE_{state.name}": state for state in State}
    known |= {f"TM_{kind.name}": kind for kind in Kind}
    known |= {"TM_RAW": check.RAW, "TM_LZ4": check.LZ4, "TM_SAME": check.SAME}
    header = constants()
    assert {name: header[name] for name in known} == known
    assert sum(name.startswith("TM_STATE_") for name in header) == len(State)


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        ("tm_counters", Counters.__struct_fields__),
        ("tm_control", Control.__struct_fields__),
        ("tm_histogram", Histogram.__struct_fields__),
        ("tm_doors", Doors.__struct_fields__),
        ("tm_remote", RemoteState.__struct_fields__),
        ("tm_statistics", (*Latencies.__struct_fields__, *Ages.__struct_fields__, "doors", "remote")),
    ],
)
def test_fields_are_those_of_the_header_in_its_order(struct: str, names: Sequence[str]) -> None:
    # Python's names say the unit; C's, in one struct, that a table is by age.
    ours = [re.sub("_(bytes|pages)$", "", name) for name in names]
    theirs = [re.sub("_bytes$|_by_age$|^ages_", "", name) for name in fields(struct)]
    assert ours == theirs
