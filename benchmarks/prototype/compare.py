"""Settle slots against log: both candidates and the kernel's zram, on the same real pages, with the same overwrites."""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks import pages, trace, zram

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = 4096
BUDGETS: Final = (1.05, 1.10, 1.20)  # the log's memory, as a multiple of zram's


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=65536, help="real pages to capture (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="use pages captured before (by pages.py)")
    parser.add_argument("--rounds", type=int, default=10, help="overwrites of each page (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def measure_zram(corpus: Path, count: int, writes: trace.Trace) -> dict[str, float]:
    """Memory zram takes for the corpus, fresh and after the trace, with and without compaction."""
    with corpus.open("rb") as file, zram.device(count * PAGE) as device:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        result: dict[str, float] = {}
        for when, batch in (("fresh", [(page, page) for page in range(count)]), ("after", writes)):
            device.write_all(memory, batch)
            for state in (when, f"{when}_settled"):
                usage = device.usage()
                result |= {f"used_{state}": usage.used, f"payload_{state}": usage.compressed}
                device.compact()
        return result


def replay(build: Path, store: str, corpus: Path, trace_file: Path, budget: float = 0) -> dict[str, float]:
    """Run one candidate; *budget* is the log's memory in bytes for each compressed byte."""
    command = [str(build / "replay"), store, str(corpus), str(trace_file), str(budget)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def per_byte(figures: dict[str, float], state: str) -> float:
    """Memory taken for each byte this candidate stores compressed."""
    return figures[f"used_{state}"] / figures[f"payload_{state}"]


def table(results: dict[str, dict[str, float]]) -> str:
    """All figures as a markdown table; memory relative to zram's in the same state of idleness as well."""
    lines = [
        "| | fresh | of zram | fresh, drained | after, not drained | after, drained | of zram |"
        " copies per overwrite | of them idle | put ns | get ns |",
        "|---|" + "---:|" * 10,
    ]
    base = results["zram"]
    for name, figures in results.items():
        used = [per_byte(figures, state) for state in ("fresh", "fresh_settled", "after", "after_settled")]
        fresh, after = (figures[f"used_{state}_settled"] / base[f"used_{state}"] for state in ("fresh", "after"))
        cells = [f"{used[0]:.3f}", f"{fresh:.3f}", *(f"{ratio:.3f}" for ratio in used[1:]), f"{after:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells + speed(figures)) + " |")
    return "\n".join(lines)


def speed(figures: dict[str, float]) -> list[str]:
    """The cells that zram does not have."""
    if "get_ns" not in figures:
        return ["", "", "", ""]
    overwrites = figures["overwrites"]
    busy = figures["copies_after"] - figures["copies_fresh_settled"]
    idle = figures["copies_after_settled"] - figures["copies_after"]
    return [
        f"{(busy + idle) / overwrites:.2f}", f"{idle / overwrites:.3f}",
        f"{figures['put_overwrite_ns']:.0f}", f"{figures['get_ns']:.0f}",
    ]  # fmt: skip


def compare(args: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """Run everything in turn."""
    subprocess.run(["make", "-s", "-C", str(HERE), f"BUILD={work}"], check=True)
    corpus = args.corpus or work / "pages"
    if not args.corpus:
        pages.capture(corpus, args.pages)
    count = corpus.stat().st_size // PAGE
    writes = trace.make(count, args.rounds)
    trace_file = work / "trace"
    trace.save(writes, trace_file)
    results = {"zram": measure_zram(corpus, count, writes)}
    results["slots"] = replay(work, "slots", corpus, trace_file)
    for budget in BUDGETS:
        allowed = budget * per_byte(results["zram"], "after")
        results[f"log at {budget:.2f}"] = replay(work, "log", corpus, trace_file, allowed)
    return results


def main() -> None:
    """Run the comparison and print its table."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = compare(args, Path(work))
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
