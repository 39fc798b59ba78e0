"""Cells: whole runs from their description, co-located and disaggregated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profiles import ProfileError
from scheduling.tiers import Slo
from simulator.cell import run_cell
from simulator.contenders import UnknownContender, names
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, Engines, Fault, FaultKind, FleetSpec, Knob, Workload
from workloads.mix import TierShare
from workloads.traces import TraceError

TIERS = tuple(
    TierShare(f"t{pace}", Slo(1.0, pace / 1e3), share)
    for pace, share in ((20, 0.1), (30, 0.2), (50, 0.3), (100, 0.4))
)
H200 = "h200-llama-3.1-8b-bf16"


def cell(name: str, rate_rps: float = 60.0, seed: int = 1, **knobs: Knob) -> Cell:
    """Three H200 (simulated) under the paper's promises; 450 requests."""
    return Cell(
        Workload("azure2023_conv", TIERS, (0.3, 0.5, 1.0)),
        FleetSpec((Engines(H200, 3),)),
        Contender(name, tuple(sorted(knobs.items()))),
        rate_rps,
        seed,
        warmup_requests=100,
        measured_requests=300,
        cooldown_requests=50,
    )


def plain(outcome: CellOutcome) -> CellOutcome:
    return replace(outcome, timing=None)


@pytest.mark.parametrize("name", names())
def test_every_contender_serves_every_request_once(name: str) -> None:
    outcome = run_cell(cell(name))
    overall = outcome.overall
    assert overall.offered == 300 == sum(tier.offered for tier in outcome.tiers)
    assert overall.finished + overall.refused + overall.failed == overall.offered
    assert sum(outcome.refusals.values()) == overall.refused
    assert overall.attained <= overall.attained_one_based <= overall.finished
    assert overall.attainment is not None
    assert overall.attainment > 0.3
    assert outcome.backend_seconds_busy <= outcome.backend_seconds * 1.02  # a step counts when it ends
    assert outcome.decisions >= 450


DRIVEN: dict[str, Knob] = {
    "chunk_from_slack": True,
    "deadline_order": True,
    "skip_loose": True,
    "relegate_late": True,
}


def test_engines_driven_by_slack_keep_every_promise_that_polyserve_makes() -> None:
    """What the policy admits at the host's pace, engines that spend slack serve on time: more, and sooner."""
    paced, driven = run_cell(cell("polyserve_co", 75.0)), run_cell(cell("polyserve_co", 75.0, 1, **DRIVEN))
    assert driven.overall.attained == driven.overall.finished
    assert driven.overall.attained >= paced.overall.attained
    first_s = (driven.overall.ttft_p50_s, paced.overall.ttft_p50_s)
    assert first_s[0] is not None
    assert first_s[1] is not None
    assert first_s[0] < first_s[1]


def test_a_driven_engine_gives_up_what_is_late_and_so_keeps_the_rest() -> None:
    """A router that looks at nobody's pace and refuses nobody, with more than the fleet can do."""
    knobs: dict[str, Knob] = {**DRIVEN, "refusal": False, "chunk_tokens": 2048}
    kept = run_cell(cell("lmetric", 140.0, 1, **knobs))
    late = run_cell(cell("lmetric", 140.0, 1, **{**knobs, "relegate_late": False}))
    assert kept.overall.finished == late.overall.finished == 300
    assert kept.overall.attained > late.overall.attained


def test_the_same_cell_gives_the_same_outcome() -> None:
    first, again = run_cell(cell("polyserve_co")), run_cell(cell("polyserve_co"))
    assert plain(first) == plain(again)
    assert first.timing is not None
    assert plain(run_cell(cell("polyserve_co", seed=2))) != plain(first)


def test_contenders_are_offered_the_same_requests() -> None:
    """Common random numbers: as many requests a tier, whatever the policy and the rate."""
    shares = {
        tuple(tier.offered for tier in run_cell(cell(name, rate_rps)).tiers)
        for name in ("random", "polyserve_co", "polyserve_pd")
        for rate_rps in (30.0, 60.0)
    }
    assert len(shares) == 1


def test_a_disaggregated_decode_does_not_disturb_its_neighbours() -> None:
    """Without prompts in between, time per output token is the decode step's."""
    apart, together = run_cell(cell("minimal_pd", 50.0)), run_cell(cell("minimal", 50.0))
    tails_s = (apart.overall.tpot_p99_s, together.overall.tpot_p99_s)
    assert tails_s[0] is not None
    assert tails_s[1] is not None
    assert tails_s[0] < tails_s[1]


def test_sending_kv_takes_time() -> None:
    """At 20 MB a second a prompt of a thousand tokens takes seven seconds: nobody's second token is on time."""
    fast = cell("minimal_pd", 20.0)
    slow = replace(fast, fleet=replace(fast.fleet, transfer_bytes_per_s=2e7))
    attained = [run_cell(each).overall.attainment for each in (fast, slow)]
    assert attained[0] == 1.0
    assert attained[1] is not None
    assert attained[1] < 0.1


def test_without_a_pace_nothing_behind_the_first_token_is_late() -> None:
    """KV that is on its way for seconds delays the second token only, which nobody promised."""
    slow = cell("minimal_pd", 20.0)
    first_only = (TierShare("first", Slo(1.0, None), 1.0),)
    slow = replace(
        slow,
        workload=replace(slow.workload, tiers=first_only),
        fleet=replace(slow.fleet, transfer_bytes_per_s=2e7, prefill_backends=1),
    )
    assert run_cell(slow).overall.attainment == 1.0


def test_a_burst_is_not_sampled_for_ever() -> None:
    """All requests at once: the fleet is looked at as often as progress is told, however long it drains."""
    outcome = run_cell(cell("random", 1e6, refusal=False))
    assert 10 < len(outcome.samples) < 1 + outcome.ended_s / 0.05 + 1


def test_a_greater_fixed_part_of_a_step_serves_less() -> None:
    quick = cell("minimal", 55.0)
    slow = replace(quick, fleet=FleetSpec((Engines(H200, 3, step_floor_s=0.012),)))
    attained = [run_cell(each).overall.attainment or 0.0 for each in (quick, slow)]
    assert attained[1] < attained[0] - 0.1


@pytest.mark.parametrize("lengths", ["mean", "learned", "known"])
def test_answer_lengths_are_known_as_asked(lengths: str) -> None:
    outcome = run_cell(cell("polyserve_co", lengths=lengths))
    assert outcome.overall.attainment is not None
    assert outcome.overall.attainment > 0.9


def test_engines_may_differ_inside_a_fleet() -> None:
    mixed = replace(
        cell("polyserve_co", 30.0), fleet=FleetSpec((Engines(H200, 2), Engines("a100-llama-3.1-8b-bf16", 1)))
    )
    outcome = run_cell(mixed)
    assert outcome.overall.attainment is not None
    assert outcome.overall.attainment > 0.9


def test_requests_without_a_promise_neither_attain_nor_miss() -> None:
    tiers = (*TIERS[:2], TierShare("batch", Slo(None, None), 0.7))
    base = cell("polyserve_co", 40.0)
    outcome = run_cell(replace(base, workload=replace(base.workload, tiers=tiers, ttft_s=())))
    batch = outcome.tiers[-1]
    assert (batch.tier, batch.unpromised, batch.attained) == ("batch", batch.offered, 0)
    assert batch.attainment is None
    assert batch.finished > 0
    promised = [tier for tier in outcome.tiers if tier.attainment is not None]
    assert outcome.overall.unpromised == batch.offered
    assert outcome.overall.attained == sum(tier.attained for tier in promised)
    assert outcome.overall.attainment == outcome.overall.attained / sum(tier.offered for tier in promised)
    assert outcome.worst_tier_attainment == min(tier.attainment or 0.0 for tier in promised)


def test_replicas_and_faults_are_counted() -> None:
    hurt = cell("polyserve_co", 40.0)
    fault = Fault(0, FaultKind.DOWN, 4.0, 2.0)
    outcome = run_cell(replace(hurt, fleet=replace(hurt.fleet, replicas=2, view_age_s=0.1, faults=(fault,))))
    assert outcome.overall.failed > 0
    overall = outcome.overall
    assert overall.finished + overall.refused + overall.failed == overall.offered


def test_prefixes_are_found_in_the_cache() -> None:
    """In this trace a prefix comes again after some hundred requests, so the cache has to hold as many prompts."""
    base = cell("minimal", 3.0)
    shared = replace(
        base,
        workload=replace(base.workload, trace="mooncake_conversation", prefixes=True),
        fleet=FleetSpec((Engines(H200, 1, kv_tokens=8_000_000),)),
        warmup_requests=200,
        measured_requests=400,
        cooldown_requests=10,
    )
    cached = replace(shared, fleet=replace(shared.fleet, prefix_caching=True))
    busy_s = [run_cell(each).instance_s_per_request or 0.0 for each in (shared, cached)]
    assert busy_s[1] < 0.98 * busy_s[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"contender": Contender("polyserv")}, UnknownContender, "polyserve"),
        ({"fleet": FleetSpec(())}, ValueError, "at least one backend"),
        ({"fleet": FleetSpec((Engines("h2000", 1),))}, ProfileError, "h2000"),
        ({"fleet": FleetSpec((Engines(H200, 1, step_floor_s=1e-4),))}, ValueError, "fixed part"),
        ({"workload": Workload("nowhere", TIERS)}, TraceError, "nowhere"),
    ],
)
def test_a_wrong_cell_is_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_cell(replace(cell("minimal"), **changes))  # type: ignore[arg-type]  # a test's shorthand


def test_without_a_pace_a_split_has_to_be_told() -> None:
    first_only = (TierShare("first", Slo(1.0, None), 1.0),)
    unsplit = cell("minimal_pd", 20.0)
    with pytest.raises(ValueError, match=r"prefill_backends: .* set it"):
        run_cell(replace(unsplit, workload=replace(unsplit.workload, tiers=first_only)))


def test_a_disaggregated_fleet_needs_two_halves() -> None:
    alone = replace(cell("random_pd"), fleet=FleetSpec((Engines(H200, 1),)))
    with pytest.raises(ValueError, match="at least two"):
        run_cell(alone)
    wrong = replace(cell("random_pd"), fleet=FleetSpec((Engines(H200, 3),), prefill_backends=3))
    with pytest.raises(ValueError, match="prefill_backends must be 1 to 2"):
        run_cell(wrong)
