# SPDX-License-Identifier: BSD-3-Clause
"""Hold a guest's output and the samples of its pool against what a swap device must do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

from tests.support.verdict import ENDED, HarnessError, guest_faults, is_idle
from tests.vm.watch import Sample

MUST_COME_BACK = 15 / 16  # of what the guest fills


def read_samples(path: Path) -> list[Sample]:
    """All samples; HarnessError when there are too few to judge by."""
    samples = [msgspec.json.decode(line, type=Sample) for line in path.read_bytes().splitlines()]
    if len(samples) < 10:
        raise HarnessError(f"only {len(samples)} samples of the pool")
    return samples


def moment(log: str, text: str) -> float:
    """When the guest said *text*: each line of its log begins with the seconds since the epoch."""
    found = re.search(rf"^([0-9.]+) .*{re.escape(text)}", log, re.MULTILINE)
    if not found:
        raise HarnessError(f"the guest never said {text!r}")
    return float(found[1])


def swap_faults(log: str) -> list[str]:
    """Whether the guest swapped enough to prove anything."""
    found = re.search(r"hog: (\d+) MiB verified, (\d+) MiB came back from swap", log)
    filled, came_back = map(int, found.groups()) if found else (1, 0)
    return [f"only {came_back} MiB came back from swap"] if came_back <= MUST_COME_BACK * filled else []


def pool_faults(samples: list[Sample], freed: float, swapoff: float) -> list[str]:
    """What the samples show: between *freed* and *swapoff* nothing but trims happened."""
    faults = []
    if not any(sample.in_tmem and sample.in_file for sample in samples):
        faults.append("pages were never in tmem and in the file at the same time")
    over = max(samples, key=lambda sample: max(sample.used, sample.allocated) - sample.limit)
    if max(over.used, over.allocated) > over.limit:
        faults.append(f"the pool took {over.allocated} bytes and says {over.used}, its limit is {over.limit}")
    before = max(sample.allocated for sample in samples)
    after = [sample for sample in samples if freed < sample.at < swapoff]
    if not after:
        raise HarnessError("no sample between the workload's end and swapoff")
    if not after[-1].trims:
        faults.append("the guest never trimmed")
    if after[-1].allocated > before / 2:
        faults.append(f"trims left {after[-1].allocated} bytes of tmpfs, of {before} at most before")
    return faults


def find_faults(log: str, samples: list[Sample], status: int) -> list[str]:
    """All that is wrong; HarnessError when there is no telling."""
    faults = guest_faults(log, status, idle=is_idle((sample.at, sample.requests) for sample in samples))
    if status == 0:
        faults += swap_faults(log) + pool_faults(samples, moment(log, "workload: freed"), moment(log, ENDED))
    return faults


def main() -> int:
    """Judge GUEST_LOG, SAMPLES and the guest's STATUS: 0 good, 1 bad, 99 the harness broke."""
    log = Path(sys.argv[1]).read_text(errors="replace")
    try:
        samples = read_samples(Path(sys.argv[2]))
        faults = find_faults(log, samples, int(sys.argv[3]))
    except HarnessError as error:
        print(f"the harness broke: {error}")
        return 99
    for fault in faults:
        print(f"FAULT: {fault}")
    peak = max(samples, key=lambda sample: sample.allocated)
    print(f"{len(samples)} samples; at its peak the pool took {peak.allocated} of {peak.limit} bytes, with")
    print(f"{peak.in_tmem} pages in tmem and {peak.in_file} in the file; at the end {samples[-1].allocated} bytes")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
