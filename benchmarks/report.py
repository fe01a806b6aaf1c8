# SPDX-License-Identifier: BSD-3-Clause
"""From rounds of measurements to medians, ratios, goals and tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.peers import BASE, BEFORE, OURS

READS: Final = ("read 1", "read 32")
WRITES: Final = ("write 1", "write 32")
PHASES: Final = READS + WRITES
ZSTD: Final = "memory zstd"

Round = dict[str, dict[str, dict[str, float]]]
"""One round: phase, then peer, then figures. The phase 'lz4' has the one figure 'ns'."""


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """Median, with the extremes where there is more than one value."""
        spread = f" ({self.low:.2f}-{self.high:.2f})" if self.high > self.low else ""
        return f"{self.median:.2f}{spread}"


@dataclass(frozen=True)
class Goal:
    """A figure that was promised: at least *bound*, or at most."""

    what: str
    measured: Spread
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the median keeps the promise."""
        return self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound


def over_rounds(rounds: list[Round], figure: Callable[[Round], float]) -> Spread:
    """One figure of each round, summarised. Ratios are taken within a round, where both sides met the same machine."""
    return Spread.of([figure(round_) for round_ in rounds])


def speed_ratio(phase: str, peer: str, base: str) -> Callable[[Round], float]:
    """How many times the requests a second of another peer."""
    return lambda round_: round_[phase][peer]["iops"] / round_[phase][base]["iops"]


def cpu_ratio(round_: Round) -> float:
    """Our server's CPU for a write at depth 32 against the limit: null's CPU plus bare LZ4."""
    write = round_["write 32"]
    return write[OURS]["cpu_us"] / (write[BASE]["cpu_us"] + round_["lz4"][""]["ns"] / 1000)


def speed_goals(rounds: list[Round]) -> list[Goal]:
    """What was promised about speed and CPU."""
    promised = [
        ("read 1", BASE, 0.9), ("read 32", BASE, 0.9), ("write 1", BASE, 0.85), ("write 32", BASE, 0.6),
        ("write 32", ZSTD, 8.0), ("read 32", ZSTD, 3.0),
    ]  # fmt: skip
    goals = [
        Goal(f"{phase}: requests/s against {base}", over_rounds(rounds, speed_ratio(phase, OURS, base)), bound, True)
        for phase, base, bound in promised
    ]
    return [*goals, Goal("write 32: server CPU against null + LZ4", over_rounds(rounds, cpu_ratio), 1.25, False)]


def fio_goals(rounds: list[Round]) -> list[Goal]:
    """Reads as fio sees them; its writes are of pages too easy to promise anything for."""
    return [
        Goal(f"{phase}, fio: requests/s against {BASE}", over_rounds(rounds, speed_ratio(phase, OURS, BASE)), 0.9, True)
        for phase in READS
    ]


def density_goals(density: dict[str, dict[str, dict[str, int]]]) -> list[Goal]:
    """What was promised about memory; a pool counts as the larger of what it and tmpfs say, zram as the smaller."""
    if "zram" not in density:
        return []
    goals = []
    for state, bound in (("fresh", 1.05), ("after", 1.10)):
        pool = density["tmem"][state]
        zram = min(density["zram"][f"{state}, not drained"]["used"], density["zram"][state]["used"])
        ratio = max(pool["used"], pool["allocated"]) / zram
        goals.append(Goal(f"memory against zram, {state}", Spread(ratio, ratio, ratio), bound, False))
    return goals


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table with aligned columns; all but the first are numbers."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"

    return "\n".join([line(header), line(rule), *map(line, rows)])


def speeds(rounds: list[Round], peer: str) -> list[str]:
    """A peer's requests a second in each phase: as a number for null, as a multiple of null's for the others."""
    if peer != BASE:
        return [str(over_rounds(rounds, speed_ratio(phase, peer, BASE))) for phase in PHASES]
    medians = [statistics.median(round_[phase][BASE]["iops"] for round_ in rounds) for phase in PHASES]
    return [f"{median / 1000:.1f}k/s" for median in medians]


def cpu(rounds: list[Round], peer: str, phase: str) -> str:
    """A server's CPU for each request."""
    return f"{statistics.median(round_[phase][peer]['cpu_us'] for round_ in rounds):.2f} us"


def speed_table(rounds: list[Round]) -> str:
    """Requests a second, and server CPU for each request."""
    rows = [
        [peer, *speeds(rounds, peer), cpu(rounds, peer, "read 32"), cpu(rounds, peer, "write 32")]
        for peer in rounds[0][PHASES[0]]
    ]
    lz4 = statistics.median(round_["lz4"][""]["ns"] for round_ in rounds) / 1000
    rows.append(["bare LZ4", *[""] * 5, f"{lz4:.2f} us"])
    return table(["4 KiB random", *PHASES, "CPU/read 32", "CPU/write 32"], rows)


def before_table(rounds: list[Round]) -> str:
    """Our requests a second and CPU for each request, as a multiple of another's."""

    def cpu_of(phase: str) -> Callable[[Round], float]:
        return lambda round_: round_[phase][OURS]["cpu_us"] / round_[phase][BEFORE]["cpu_us"]

    rows = [
        ["requests/s", *(str(over_rounds(rounds, speed_ratio(phase, OURS, BEFORE))) for phase in PHASES)],
        ["CPU", *(str(over_rounds(rounds, cpu_of(phase))) for phase in PHASES)],
    ]
    return table([f"{OURS} by {BEFORE}", *PHASES], rows)


def fio_table(rounds: list[Round]) -> str:
    """Requests a second as fio sees them: reads of real pages, writes of its own synthetic ones."""
    return table(["fio", *PHASES], [[peer, *speeds(rounds, peer)] for peer in rounds[0][PHASES[0]]])


def density_table(density: dict[str, dict[str, dict[str, int]]]) -> str:
    """Memory taken for each compressed byte."""
    states = list(density["tmem"])
    rows = [
        [name, *(f"{figures[state]['used'] / figures[state]['compressed']:.3f}" for state in states)]
        for name, figures in density.items()
    ]
    return table(["memory / compressed bytes", *states], rows)


def goals_table(goals: list[Goal]) -> str:
    """Promises and whether they were kept."""
    rows = [
        [
            goal.what,
            str(goal.measured),
            f"{'>=' if goal.at_least else '<='} {goal.bound:g}",
            "yes" if goal.met else "NO",
        ]
        for goal in goals
    ]
    return table(["goal", "measured", "promised", "met"], rows)


def render(results: dict[str, Any]) -> str:
    """All tables, ready for a README."""
    parts, goals = [], []
    if results["rounds"]:
        parts += [speed_table(results["rounds"]), fio_table(results["fio"])]
        if BEFORE in results["rounds"][0][PHASES[0]]:
            parts.append(before_table(results["rounds"]))
        goals += speed_goals(results["rounds"]) + fio_goals(results["fio"])
    if results["density"]:
        parts.append(density_table(results["density"]))
        goals += density_goals(results["density"])
    return "\n\n".join([*parts, goals_table(goals)])
