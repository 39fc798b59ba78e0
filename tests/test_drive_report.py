"""What `bench.engine_drive` makes of its runs, and when it stops."""

from __future__ import annotations

import argparse
import math

import pytest

from bench.drive_report import COLUMNS, Outcome, paired, percentile, share_of, show, spread
from bench.engine_drive import another


def outcome(seed: int, attained: float, gap_s: float) -> Outcome:
    return Outcome(
        seed=seed,
        tight_attained=attained,
        loose_attained=1.0,
        loose_ttft_attained=1.0,
        tight_itl_p99_s=gap_s,
        tight_ttft_p99_s=0.1,
        loose_ttft_p50_s=1.0,
        tokens_per_s=1000.0,
        steps=100,
        step_mean_s=0.01,
        skipped=1,
        plan_us=50.0,
        failures=0,
        tight=10,
        loose=5,
        lateness_p99_s=0.001,
    )


ONE = [outcome(1, 0.9, 0.05), outcome(2, 1.0, 0.04), outcome(3, 0.8, 0.09)]
OTHER = [outcome(3, 0.7, 0.08), outcome(1, 0.9, 0.06), outcome(4, 0.1, 9.0)]


def test_arms_are_compared_on_the_same_requests_only() -> None:
    attained, gap = COLUMNS[0], COLUMNS[3]
    found = paired(ONE, OTHER, attained)
    assert found.differences == pytest.approx((0.0, 0.1))
    assert (found.better, found.worse) == (1, 0)
    found = paired(ONE, OTHER, gap)
    assert found.differences == pytest.approx((-0.01, 0.01))
    assert (found.better, found.worse) == (1, 1), "a smaller gap is better"


def test_the_table_has_each_arm_and_each_difference(capsys: pytest.CaptureFixture[str]) -> None:
    show({"static 64": OTHER, "driven": ONE}, "driven")
    printed = capsys.readouterr().out
    assert "90.0 (80.0-100.0)" in printed
    assert "5.0 (0.0-10.0) 1:0" in printed
    assert "50 (50-50) us of 10.0 (10.0-10.0) ms: 0.5%" in printed


def test_numbers() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"
    assert percentile([1.0, 2.0, 3.0], 0.99) == 3.0
    assert share_of([True, False]) == 0.5
    assert math.isnan(share_of([]))


@pytest.mark.parametrize(
    ("repetition", "passed_s", "minutes", "more"),
    [
        (-1, 0.0, 1.0, True),
        (0, 0.0, 1.0, True),
        (1, 29.0, 1.0, True),
        (1, 31.0, 1.0, False),
        (5, 0.0, None, False),
    ],
)
def test_repetitions_are_as_many_as_fit(
    repetition: int, passed_s: float, minutes: float | None, more: bool
) -> None:
    args = argparse.Namespace(repetitions=5, minutes=minutes, warm_up=False)
    assert another(repetition, passed_s, args) is more
