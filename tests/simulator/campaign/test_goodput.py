"""The search on curves whose crossing is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.campaign.curve import Bound, Crossing, Point, bracket, crossing, falling
from simulator.campaign.goodput import (
    EVERY_TIER,
    MAIN,
    TARGETS,
    Goodput,
    Judged,
    Length,
    Search,
    SearchSettings,
    Subject,
    Target,
    attainment,
    mean_curve,
    ratio,
)
from simulator.campaign.interval import t_interval
from simulator.campaign.plan import Plan
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender
from tests.simulator.campaign.fakes import FLEET, WORKLOAD, Knee, Runner, outcome

SETTINGS = SearchSettings(Length(10, 1000, 10))


def search(reference_rps: float = 10.0, of: SearchSettings = SETTINGS) -> Search:
    return Search(Subject(WORKLOAD, FLEET, Contender("random"), reference_rps), of)


def carried_out(plan: Plan, run: Runner, most_rounds: int = 50) -> dict[Cell, CellOutcome]:
    """A plan run to its end, round by round."""
    known: dict[Cell, CellOutcome] = {}
    for _ in range(most_rounds):
        wanted = plan.wanted(known)
        if not wanted:
            return known
        assert not set(wanted) & set(known)
        assert sum(cell.requests for cell in wanted) <= plan.ahead(known)
        known.update((cell, run(cell)) for cell in wanted)
    raise AssertionError("the plan does not end")


@given(st.floats(3.0, 11.0), st.floats(0.01, 0.15))
@settings(max_examples=60, deadline=None)
def test_finds_the_crossing_with_few_runs(capacity_rps: float, width: float) -> None:
    knee, plan = Knee(capacity_rps, width), search()
    known = carried_out(plan, knee)
    assert len(known) <= SETTINGS.most_rates * 3
    found = plan.goodput(MAIN, known)
    for seed, one in zip(SETTINGS.seeds, found.by_seed, strict=True):
        true_rps = knee.crossing_rps(0.9, seed)
        if one.bound is Bound.EXACT:
            assert one.rate == pytest.approx(true_rps, abs=0.02 * 10)
        elif one.bound is Bound.AT_MOST:
            assert one.rate >= true_rps
        else:
            assert one.rate <= true_rps


@given(
    st.dictionaries(st.integers(2, 12), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=11),
    st.sampled_from(TARGETS),
)
@settings(deadline=None)
def test_noise_ends_and_stays_inside_the_range(noise: dict[int, tuple[float, float]], target: Target) -> None:
    plan = search()

    def run(cell: Cell) -> CellOutcome:
        overall, worst = noise[min(12, max(2, round(cell.rate_rps)))]
        return outcome(overall, worst)

    known = carried_out(plan, run)
    found = plan.goodput(target, known)
    assert all(2.0 <= one.rate <= 12.0 for one in found.by_seed)
    parts = plan.parts(known)
    assert SETTINGS.lowest <= min(parts) <= max(parts) <= SETTINGS.highest
    assert len(parts) <= SETTINGS.most_rates


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_a_little_noise_moves_the_answer_a_little(noise: float) -> None:
    knee, plan = Knee(9.0, 0.05, noise), search()
    found = plan.goodput(MAIN, carried_out(plan, knee))
    assert found.bound is Bound.EXACT
    assert found.estimate.mean == pytest.approx(knee.crossing_rps(0.9, 2), rel=0.03)


def test_a_plateau_just_above_the_level_does_not_stop_it_early() -> None:
    plan = search()
    known = carried_out(plan, lambda cell: outcome(0.905 if cell.rate_rps < 9.3 else 0.2, offered=100_000))
    assert plan.goodput(MAIN, known).estimate.mean == pytest.approx(9.3, abs=0.2)


@pytest.mark.parametrize(("level", "bound", "rate_rps"), [(1.0, Bound.AT_LEAST, 12.0), (0.5, Bound.AT_MOST, 2.0)])
def test_says_when_a_target_is_never_missed_or_never_reached(level: float, bound: Bound, rate_rps: float) -> None:
    plan = search()
    found = plan.goodput(MAIN, carried_out(plan, lambda _: outcome(level)))
    assert {one.bound for one in found.by_seed} == {bound}
    assert found.bound is bound
    assert found.estimate.mean == rate_rps
    assert found.resolution_rps is None


def test_seeds_on_both_sides_are_no_bound_at_all() -> None:
    plan = search()
    found = plan.goodput(MAIN, carried_out(plan, lambda cell: outcome(1.0 if cell.seed == 1 else 0.1)))
    assert found.bound is Bound.UNKNOWN


def test_every_tier_is_judged_by_the_worst() -> None:
    knee, plan = Knee(9.0), search()
    known = carried_out(plan, knee)
    overall, every = plan.goodput(MAIN, known), plan.goodput(EVERY_TIER, known)
    # the fake's tight tier meets its knee at a rate lower by a tenth
    assert every.estimate.mean == pytest.approx(overall.estimate.mean / 1.1, rel=0.03)


def test_targets_share_runs() -> None:
    knee = Knee(9.0)
    alone = [carried_out(search(of=replace(SETTINGS, targets=(target,))), knee) for target in TARGETS]
    together = carried_out(search(), knee)
    assert len(together) < sum(map(len, alone))
    assert len(together) <= 24


def test_beginning_where_the_answer_is_expected_saves_runs() -> None:
    knee, only = Knee(10.3), replace(SETTINGS, targets=(MAIN,))
    far, near = search(of=only), search(of=only.around(0.92))
    known_far, known_near = carried_out(far, knee), carried_out(near, knee)
    assert len(known_near) < len(known_far)
    assert near.goodput(MAIN, known_near).estimate.mean == pytest.approx(
        far.goodput(MAIN, known_far).estimate.mean, rel=0.02
    )
    wrong = search(of=only.around(0.4))
    assert wrong.goodput(MAIN, carried_out(wrong, knee)).estimate.mean == pytest.approx(
        knee.crossing_rps(0.9, 2), rel=0.03
    )


def test_the_same_seeds_and_lengths_at_every_rate() -> None:
    known = carried_out(search(), Knee(9.0))
    by_rate: dict[float, set[tuple[int, int]]] = {}
    for cell in known:
        by_rate.setdefault(cell.rate_rps, set()).add((cell.seed, cell.measured_requests))
    assert set(map(frozenset, by_rate.values())) == {frozenset({(1, 1000), (2, 1000), (3, 1000)})}


def test_the_last_digits_of_a_reference_do_not_matter() -> None:
    one, other = search(10.000000001), search(10.000000002)
    assert one.wanted({}) == other.wanted({})


def test_a_search_that_stopped_goes_on_where_it_was() -> None:
    knee, plan = Knee(9.0), search()
    whole = carried_out(plan, knee)
    half = dict(list(whole.items())[:10])
    while wanted := plan.wanted(half):
        half.update((cell, knee(cell)) for cell in wanted)
    assert half == whole


@pytest.mark.parametrize("grid", [(), (0.1, 1.0), (0.5, 1.5)])
def test_grids_outside_the_range_are_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        replace(SETTINGS, grid=grid)


def goodput(rates: tuple[float, ...], bound: Bound = Bound.EXACT) -> Goodput:
    crossings = tuple(Crossing(rate, bound) for rate in rates)
    return Goodput(MAIN, crossings, t_interval(rates), bound, 0.1)


def test_ratios_are_paired_by_seed() -> None:
    found = ratio(goodput((11.0, 22.0, 33.0)), goodput((10.0, 20.0, 30.0)))
    assert found.estimate.mean == pytest.approx(1.1)
    assert found.estimate.half == pytest.approx(0.0, abs=1e-9)
    assert found.bound is Bound.EXACT


@pytest.mark.parametrize(
    ("above", "below", "joined"),
    [
        (Bound.AT_LEAST, Bound.EXACT, Bound.AT_LEAST),
        (Bound.EXACT, Bound.AT_MOST, Bound.AT_LEAST),
        (Bound.AT_LEAST, Bound.AT_MOST, Bound.AT_LEAST),
        (Bound.EXACT, Bound.AT_LEAST, Bound.AT_MOST),
        (Bound.AT_LEAST, Bound.AT_LEAST, Bound.UNKNOWN),
        (Bound.UNKNOWN, Bound.EXACT, Bound.UNKNOWN),
    ],
)
def test_a_ratio_of_bounds_is_a_bound(above: Bound, below: Bound, joined: Bound) -> None:
    assert ratio(goodput((2.0, 2.0), above), goodput((1.0, 1.0), below)).bound is joined


def test_attainment_over_seeds() -> None:
    runs = [outcome(level, level / 2) for level in (0.8, 0.9)]
    assert attainment(MAIN, runs).mean == pytest.approx(0.85)
    assert attainment(EVERY_TIER, runs).mean == pytest.approx(0.425)


def test_the_mean_curve_never_rises() -> None:
    plan = search()
    known = carried_out(plan, Knee(9.0, 0.05, 0.1))
    levels = [point.attainment for point in mean_curve(plan, MAIN, known)]
    assert levels == sorted(levels, reverse=True)
    assert len(levels) == len(plan.parts(known))


points = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=10)


@given(points, st.floats(0.5, 0.99))
def test_a_crossing_lies_between_tested_rates(raw: list[tuple[float, float, int]], level: float) -> None:
    curve = [Point(*one) for one in raw]
    found = crossing(curve, level)
    rates = [point.rate for point in curve]
    assert min(rates) <= found.rate <= max(rates)
    fitted = falling(curve)
    assert [point.attainment for point in fitted] == sorted((p.attainment for p in fitted), reverse=True)
    mass = sum(point.attainment * point.offered for point in curve)
    assert sum(point.attainment * point.offered for point in fitted) == pytest.approx(mass, abs=1e-6)
    if found.bound is Bound.EXACT:
        between = bracket(curve, level)
        assert between.low is not None
        assert between.high is not None
        assert between.low <= found.rate <= between.high


def test_curves_that_fall_are_left_as_they_are() -> None:
    curve = (Point(1.0, 0.99, 10), Point(2.0, 0.9, 1000), Point(3.0, 0.1, 10))
    assert falling(curve[::-1]) == curve
    assert crossing(curve, 0.9).rate == 2.0


def test_labels() -> None:
    assert [target.label for target in TARGETS] == [
        "90% overall",
        "90% every tier",
        "95% overall",
        "99% overall",
    ]
    assert Judged.OVERALL in {target.judged for target in TARGETS}
