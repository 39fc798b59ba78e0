"""What runs of `bench.engine_drive` show: a line for each arm, and how much better one arm is, run by run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one arm. Times in seconds; nan where nothing was offered.

    Attributes:
        tight_attained, loose_attained: parts of the streams of which every token was on time.
        loose_ttft_attained: of the loose ones of which the first token was.
        lateness_p99_s: how much later than planned requests were sent: what the load generator lacks.
        failures: plans that failed.
    """

    seed: int
    tight_attained: float
    loose_attained: float
    loose_ttft_attained: float
    tight_itl_p99_s: float
    tight_ttft_p99_s: float
    loose_ttft_p50_s: float
    tokens_per_s: float
    steps: int
    step_mean_s: float
    skipped: int
    plan_us: float | None
    failures: int
    tight: int
    loose: int
    lateness_p99_s: float


class Column(NamedTuple):
    """A figure of a run, and how it is shown."""

    title: str
    value: Callable[[Outcome], float]
    scale: float
    digits: int
    sign: int  # 1 where more is better, -1 where less is


COLUMNS = (
    Column("tight attained %", lambda one: one.tight_attained, 100.0, 1, 1),
    Column("loose attained %", lambda one: one.loose_attained, 100.0, 1, 1),
    Column("loose TTFT kept %", lambda one: one.loose_ttft_attained, 100.0, 1, 1),
    Column("tight ITL p99 ms", lambda one: one.tight_itl_p99_s, 1e3, 0, -1),
    Column("tight TTFT p99 ms", lambda one: one.tight_ttft_p99_s, 1e3, 0, -1),
    Column("loose TTFT p50 ms", lambda one: one.loose_ttft_p50_s, 1e3, 0, -1),
    Column("tokens/s", lambda one: one.tokens_per_s, 1.0, 0, 1),
)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def share_of(kept: Sequence[bool]) -> float:
    """The part that is true."""
    return statistics.fmean(kept) if kept else float("nan")


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median (least to greatest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle * scale:.{digits}f} ({low * scale:.{digits}f}-{high * scale:.{digits}f})"


class Paired(NamedTuple):
    """One arm against another in the runs with the same requests.

    Attributes:
        differences: the one's figure less the other's, run by run.
        better, worse: in how many runs it was.
    """

    differences: tuple[float, ...]
    better: int
    worse: int


def paired(one: Sequence[Outcome], other: Sequence[Outcome], column: Column) -> Paired:
    """Compare run by run: the same seed offered both the same requests, within minutes."""
    others = {run.seed: column.value(run) for run in other}
    differences = tuple([column.value(run) - others[run.seed] for run in one if run.seed in others])
    better = sum([difference * column.sign > 0.0 for difference in differences])
    return Paired(differences, better, sum([difference * column.sign < 0.0 for difference in differences]))


def show(outcomes: Mapping[str, Sequence[Outcome]], hero: str) -> None:
    """Every arm by itself, the arm `hero` against each other one, and what the plug-in cost."""
    count = max(len(runs) for runs in outcomes.values())
    print(f"\n{count} runs of each arm: median (least-greatest)")
    print(f"{'':27}" + "".join(f"{column.title:>24}" for column in COLUMNS))
    for name, runs in outcomes.items():
        cells = [spread([column.value(run) for run in runs], column.scale, column.digits) for column in COLUMNS]
        print(f"{name:27}" + "".join(f"{cell:>24}" for cell in cells))
    if hero in outcomes:
        _show_paired(outcomes, hero)
    print("\nthe plug-in's own time a step, and its share of the mean step")
    for name, runs in outcomes.items():
        costs = [run.plan_us for run in runs if run.plan_us is not None]
        if costs:
            share = statistics.median(costs) * 1e-6 / statistics.median([run.step_mean_s for run in runs])
            print(
                f"{name:27} {spread(costs, digits=0)} us of {spread([run.step_mean_s for run in runs], 1e3)} ms: "
                f"{share:.1%}; {sum(run.skipped for run in runs)} decodes left out, "
                f"{sum(run.failures for run in runs)} plans failed"
            )
    late_s = max(run.lateness_p99_s for runs in outcomes.values() for run in runs)
    print(f"requests were sent at most {late_s * 1e3:.0f} ms late (p99 of the worst run)")


def _show_paired(outcomes: Mapping[str, Sequence[Outcome]], hero: str) -> None:
    print(f"\n{hero} less each other arm, on the same requests: median difference (least-greatest), better:worse")
    print(f"{'':27}" + "".join(f"{column.title:>30}" for column in COLUMNS))
    for name, runs in outcomes.items():
        if name == hero:
            continue
        cells = []
        for column in COLUMNS:
            found = paired(outcomes[hero], runs, column)
            shown = spread(found.differences, column.scale, column.digits) if found.differences else "-"
            cells.append(f"{shown} {found.better}:{found.worse}")
        print(f"{name:27}" + "".join(f"{cell:>30}" for cell in cells))
