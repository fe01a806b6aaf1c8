# SPDX-License-Identifier: BSD-3-Clause
"""What is the device's fault and what is the harness's, as the tests with real guests tell them apart."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.support import fakes
from tests.support.contention import Sampler
from tests.support.harness import wait_until
from tests.support.verdict import HarnessError, is_idle, second_chance
from tests.vm.judge import find_faults
from tests.vm.watch import Sample

GOOD = """\
10 guest: up
11 guest: swapping on /dev/vda
60 hog: 640 MiB verified, 610 MiB came back from swap, 0 pages wrong
60 workload: freed; all
70 guest: swapoff succeeded
71 guest: dmesg is clean
"""


def samples(*, busy_until: float = 70) -> list[Sample]:
    """One each second; requests until then, and trims from 60 on."""

    def sample(at: int) -> Sample:
        done = int(min(at, busy_until))
        taken = 50 if at < 61 else 5
        return Sample(at, taken, taken, 100, in_tmem=9, in_file=9, trims=max(0, done - 59), requests=done)

    return [sample(at) for at in range(1, 71)]


def test_a_good_guest_has_no_faults() -> None:
    assert find_faults(GOOD, samples(), 0) == []


@pytest.mark.parametrize(
    ("log", "status", "fault"),
    [
        (GOOD.replace(" 0 pages", " 3 pages"), 0, "3 pages came back wrong"),
        (GOOD.replace("610 MiB", "600 MiB"), 0, "only 600 MiB came back"),
        (GOOD, 3, "ended with status 3"),
        (GOOD, 137, "ended with status 137"),
        ("10 guest: up\n11 attach: no route to 10.0.2.2\n", 1, "ended with status 1"),
        ("10 guest: up\n", 255, "ended with status 255"),
    ],
)
def test_what_the_guest_finds_is_a_fault(log: str, status: int, fault: str) -> None:
    (found,) = find_faults(log, samples(), status)
    assert fault in found


@pytest.mark.parametrize("status", [124, 137])
def test_who_stops_in_the_middle_has_met_a_fault_and_who_is_slow_has_not(status: int) -> None:
    log = GOOD.partition("60 hog")[0]
    assert find_faults(log, samples(busy_until=30), status) == ["the guest stopped in the middle"]
    with pytest.raises(HarnessError, match="worked on"):
        find_faults(log, samples(), status)


def test_a_disk_that_never_answers_is_a_fault() -> None:
    assert find_faults("10 guest: up\n", samples(busy_until=11), 124) == ["the guest stopped in the middle"]


@pytest.mark.parametrize("request_", ["reads", "writes", "trims"])
def test_who_only_reads_or_trims_is_not_idle(tmp_path: Path, request_: str) -> None:
    with fakes.pool(tmp_path, "web") as fd:
        sampler = Sampler({"web": tmp_path / "web.pool"})
        with sampler.running():
            fakes.write_counters(fd, fakes.counters(**{request_: 1}))
            wait_until(lambda: sampler.samples[-1].requests["web"] == 1, "the request to be seen")
    assert not is_idle((sample.at, sample.requests["web"]) for sample in sampler.samples)


@pytest.mark.parametrize("status", [0, 1, 124, 137])
def test_a_guest_that_does_not_boot_says_nothing_of_the_device(status: int) -> None:
    with pytest.raises(HarnessError, match="did not boot"):
        find_faults("9 a kernel's last words", samples(), status)


@pytest.mark.parametrize("line", ["hog:", "workload:", "guest: swapoff", "guest: dmesg"])
def test_lost_lines_are_no_verdict(line: str) -> None:
    log = "".join(each for each in GOOD.splitlines(keepends=True) if line not in each)
    with pytest.raises(HarnessError):
        find_faults(log, samples(), 0)


def test_a_second_chance_is_given_once_and_said() -> None:
    run = Mock(side_effect=[HarnessError("no boot"), "fine"])
    with pytest.warns(UserWarning, match="once more: no boot"):
        assert second_chance(run) == "fine"
    run = Mock(side_effect=[HarnessError("no boot"), HarnessError("again"), "fine"])
    with pytest.warns(UserWarning, match="once more"), pytest.raises(HarnessError, match="again"):
        second_chance(run)


def test_a_fault_gets_no_second_chance() -> None:
    run = Mock(side_effect=[AssertionError("a wrong page"), "fine"])
    with pytest.raises(AssertionError):
        second_chance(run)
    assert run.call_count == 1
