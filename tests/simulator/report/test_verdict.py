"""The verdict: who keeps most in the worst tier, and when nobody can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduling.tiers import Slo
from simulator.report.summary import compare
from simulator.report.values import Run
from simulator.report.verdict import verdicts
from simulator.scenario import Contender
from tests.simulator.report.conftest import TIERS, made_cell, made_outcome


def told(kept: Mapping[str, Sequence[int]], busy: Mapping[str, float] | None = None) -> str:
    """The verdict on runs that keep so many of 1,000 in the worst tier, by seed."""
    runs = []
    for name, counts in kept.items():
        for seed, count in enumerate(counts):
            model = made_outcome(made_cell(seed=seed))
            tiers = [replace(tier, offered=1000, attained=1000) for tier in model.tiers]
            tiers[1] = replace(tiers[1], attained=count)
            used = (busy or {}).get(name, 5.0) * model.window_s
            outcome = replace(model, tiers=tuple(tiers), backend_seconds_busy=used)
            runs.append(Run(made_cell(Contender(name), seed=seed), outcome))
    return " ".join(verdicts(compare(runs)[0]))


def test_the_best_is_named_with_the_next_and_its_busy_backends() -> None:
    found = told({"random": (500, 510, 505), "polyserve_co": (990, 991, 992)}, {"polyserve_co": 6.5})
    assert found.startswith("At 40 requests/s polyserve_co (99.1 % of 30ms) keeps most in its worst tier")
    assert "next is random (50.5 % of 30ms)" in found
    assert "6.5 of 8 backends busy" in found
    assert "Nobody" not in found
    assert "--seeds" not in found


def test_a_tie_goes_to_the_fewest_busy_backends() -> None:
    found = told(
        {"random": (990, 960, 975), "polyserve_co": (980, 970, 976), "minimal": (400, 410, 400)},
        {"random": 7.0, "polyserve_co": 6.0, "minimal": 1.0},
    )
    assert "a tie within the intervals in the worst tier: polyserve_co (97.5 %" in found
    assert "then minimal (40.3 %" in found
    assert "Of these polyserve_co keeps the fewest backends busy: 6.0 of 8." in found


def test_few_seeds_that_agree_are_no_tie_but_not_sure() -> None:
    found = told({"random": (500, 700), "polyserve_co": (890, 800)})
    assert "polyserve_co (84.5 % of 30ms) keeps most" in found
    assert "the 2 seeds agree on them, but are too few" in found
    assert "Take --seeds 4" in found
    assert "Nobody keeps 90 % of every tier" in found


def test_one_seed_is_told() -> None:
    assert "One seed has no interval" in told({"random": (500,), "polyserve_co": (890,)})
    assert "One seed" not in told({"polyserve_co": (890,)})


def test_without_a_promise_there_is_no_verdict() -> None:
    cell = made_cell()
    free = tuple(replace(tier, slo=Slo(None, None)) for tier in TIERS)
    cell = replace(cell, workload=replace(cell.workload, tiers=free, ttft_s=()))
    assert verdicts(compare([Run(cell, made_outcome(cell))])[0]) == ()
