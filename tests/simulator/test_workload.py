"""What a cell offers: common random numbers, shares, promises an idle engine keeps, and prefix blocks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.tiers import Slo
from simulator.requests import SimRequest
from simulator.scenario import Arrivals, Cell, Contender, Engines, FleetSpec, Workload
from simulator.workload import IdleEngine, Offered, offered, tier_set
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime
from workloads.mix import TierShare, WorkloadError
from workloads.traces import Trace, TraceRequest, shipped_trace

TIERS = tuple(
    TierShare(f"t{ms}", Slo(None, ms / 1e3), share) for ms, share in ((20, 0.1), (30, 0.2), (50, 0.3), (100, 0.4))
)
PROMISES_S = (0.3, 0.5, 1.0)
LENGTHS = Trace(
    "lengths", tuple(TraceRequest(3.0 * place + place % 3, 100 + place, 1 + place % 7) for place in range(400))
)
"""Every prompt length once; not evenly spaced in time."""


def cell(
    requests: int = 300,
    rate_rps: float = 10.0,
    seed: int = 1,
    workload: Workload | None = None,
    name: str = "random",
) -> Cell:
    workload = workload or Workload("lengths", TIERS, PROMISES_S)
    edge = requests // 10
    fleet = FleetSpec((Engines("h200-llama-3.1-8b-fp8", 4),))
    return Cell(workload, fleet, Contender(name), rate_rps, seed, edge, requests - 2 * edge, edge)


def workload(**more: object) -> Workload:
    return replace(Workload("lengths", TIERS, PROMISES_S), **more)  # type: ignore[arg-type]  # fields of a test


def without_times(requests: Sequence[SimRequest]) -> list[SimRequest]:
    return [replace(one, request=replace(one.request, arrival_s=0.0)) for one in requests]


# --- common random numbers -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rates=st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)),
    seed=st.integers(0, 2**40),
    arrivals=st.sampled_from(Arrivals),
    invert_at=st.sampled_from((None, 0.0, 0.5, 1.0)),
)
def test_a_rate_changes_the_times_and_nothing_else(
    rates: tuple[float, float], seed: int, arrivals: Arrivals, invert_at: float | None
) -> None:
    what = workload(arrivals=arrivals, invert_at=invert_at)
    slow, fast = (list(offered(cell(60, rate, seed, what), trace=LENGTHS)) for rate in rates)
    assert without_times(slow) == without_times(fast)
    for one, other in zip(slow, fast, strict=True):
        assert one.request.arrival_s * rates[0] == pytest.approx(other.request.arrival_s * rates[1], abs=1e-6)


def test_a_contender_and_a_longer_run_change_nothing() -> None:
    base = list(offered(cell(100), trace=LENGTHS))
    assert base == list(offered(cell(100, name="polyserve"), trace=LENGTHS))
    longer = list(offered(cell(200), trace=LENGTHS))[:100]
    assert [one.request for one in base] == [one.request for one in longer]
    assert base != list(offered(cell(100, seed=2), trace=LENGTHS))


def test_other_promises_leave_lengths_and_tiers_alone() -> None:
    """Each property has a random stream of its own."""
    base = list(offered(cell(), trace=LENGTHS))
    other = list(offered(cell(workload=workload(ttft_s=(2.0,))), trace=LENGTHS))
    assert [one.request.prompt_tokens for one in base] == [one.request.prompt_tokens for one in other]
    assert [one.request.tier for one in base] == [one.request.tier for one in other]
    assert {one.request.slo.ttft_s for one in other} == {2.0}


def test_a_request_that_is_left_out_moves_no_other() -> None:
    base = list(offered(cell(), trace=LENGTHS))
    kept = list(offered(cell(), lambda prompt, _: math.inf if prompt > 400 else 0.0, trace=LENGTHS))
    moved = 0
    for one, other in zip(base, kept, strict=True):
        if one.request.prompt_tokens <= 400:
            assert one == other
        else:
            moved += 1
            assert other.request.prompt_tokens <= 400
            assert other == replace(
                one,
                request=replace(one.request, prompt_tokens=other.request.prompt_tokens),
                output_tokens=other.output_tokens,
            )
    assert moved > 30


def test_it_can_be_walked_again() -> None:
    requests = offered(cell(), lambda prompt, _: math.inf if prompt > 400 else 0.0, trace=LENGTHS)
    assert list(requests) == list(requests)


# --- who comes -------------------------------------------------------------------------------------------------


def test_warm_up_measured_and_cool_down_follow_each_other() -> None:
    flags = [one.measured for one in offered(cell(100), trace=LENGTHS)]
    assert flags == [False] * 10 + [True] * 80 + [False] * 10


def _shares(requests: Sequence[SimRequest]) -> list[float]:
    count = Counter(one.request.tier for one in requests)
    return [count[share.name] / len(requests) for share in TIERS]


def test_tiers_come_by_their_shares_and_promises_evenly() -> None:
    requests = list(offered(cell(20_000), trace=LENGTHS))
    assert _shares(requests) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    promises = Counter(one.request.slo for one in requests if one.request.tier == "t50")
    assert {(slo.ttft_s, slo.tpot_s) for slo in promises} == {(ttft_s, 0.05) for ttft_s in PROMISES_S}
    total = sum(promises.values())
    assert all(count / total == pytest.approx(1 / 3, abs=0.03) for count in promises.values())
    assert all(one.request.max_output_tokens is None for one in requests)


def test_the_mix_is_inverted_at_a_part_of_the_measured_requests() -> None:
    requests = list(offered(cell(20_000, workload=workload(invert_at=0.25)), trace=LENGTHS))
    turn = 2_000 + 4_000
    assert _shares(requests[:turn]) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.025)
    assert _shares(requests[turn:]) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.025)


def test_without_promises_to_draw_a_tier_has_its_own() -> None:
    what = Workload("lengths", (TierShare("a", Slo(0.7, 0.05), 1.0), TierShare("free", Slo(None, None), 1.0)))
    slos = {one.request.tier: one.request.slo for one in offered(cell(workload=what), trace=LENGTHS)}
    assert slos == {"a": Slo(0.7, 0.05), "free": Slo(None, None)}


def test_poisson_gaps_have_the_rate_and_its_spread() -> None:
    times = [one.request.arrival_s for one in offered(cell(20_000, rate_rps=25.0), trace=LENGTHS)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean_s = sum(gaps) / len(gaps)
    variance = sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)
    assert mean_s == pytest.approx(1 / 25.0, rel=0.03)
    assert math.sqrt(variance) / mean_s == pytest.approx(1.0, abs=0.05)
    assert min(gaps) >= 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_trace_is_played_end_to_end_at_the_rate(seed: int) -> None:
    """In the trace's order from a seeded start, again and again, with a mean gap between laps."""
    requests = list(offered(cell(1_300, 50.0, seed, workload(arrivals=Arrivals.TRACE)), trace=LENGTHS))
    prompts = [one.request.prompt_tokens - 100 for one in requests]
    assert all(later == (earlier + 1) % 400 for earlier, later in itertools.pairwise(prompts))
    times = [one.request.arrival_s for one in requests]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert (times[1_200] - times[0]) / 1_200 == pytest.approx(1 / 50.0)  # three laps exactly


def test_coarse_ticks_are_spread() -> None:
    what = workload(arrivals=Arrivals.TRACE)
    requests = offered(cell(3_000, 3.4, workload=what), trace=shipped_trace("mooncake_conversation"))
    times = [one.request.arrival_s for one in requests]
    assert len(set(times)) == 3_000
    assert times == sorted(times)


# --- promises that an idle engine keeps ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(per_token_s=st.floats(1e-4, 3e-3), seed=st.integers(0, 1000))
def test_every_promise_is_achievable(per_token_s: float, seed: int) -> None:
    requests = offered(cell(120, seed=seed), lambda prompt, _: prompt * per_token_s, trace=LENGTHS)
    for one in requests:
        assert one.request.slo.ttft_s is not None
        assert one.request.prompt_tokens * per_token_s <= one.request.slo.ttft_s


def test_the_part_left_out_is_counted_and_shares_stay() -> None:
    """A quarter of the rows is out of reach for everyone, and all of them for nobody."""
    requests = offered(cell(20_000), lambda prompt, _: 1.1 if prompt >= 400 else 0.4, trace=LENGTHS)
    taken = list(requests)
    assert requests.left_out == pytest.approx(0.25, abs=0.01)
    assert _shares(taken) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    assert {one.request.slo.ttft_s for one in taken} == {0.5, 1.0}
    everything = offered(cell(), trace=LENGTHS)
    assert list(everything)
    assert everything.left_out == 0.0


def test_requests_longer_than_the_engine_takes_are_left_out() -> None:
    requests = offered(cell(), trace=LENGTHS, max_tokens=300)
    assert all(one.request.prompt_tokens + one.output_tokens <= 300 for one in requests)
    assert requests.left_out == pytest.approx(0.5, abs=0.06)


def test_a_promise_nobody_can_keep_is_an_error_that_names_the_tier() -> None:
    requests = offered(cell(), lambda _, tpot_s: math.inf if tpot_s < 0.03 else 0.0, trace=LENGTHS)
    with pytest.raises(WorkloadError, match="promise of t20: loosen it"):
        list(requests)


@settings(max_examples=50, deadline=None)
@given(
    prompt_tokens=st.integers(1, 60_000),
    tpot_s=st.sampled_from((0.006, 0.01, 0.02, 0.1, math.inf)),
    budget=st.sampled_from((16, 512, 8192)),
    host_s=st.sampled_from((0.0, 0.002)),
    other=st.integers(1, 60_000),
)
def test_an_idle_engine_is_walked_chunk_by_chunk(
    prompt_tokens: int, tpot_s: float, budget: int, host_s: float, other: int
) -> None:
    step_time = RooflineStepTime(
        c0_s=0.004, weights_s=0.001, per_token_s=1e-5, sharpness=2.0, per_kv_s=1e-8, per_attention_s=1e-10
    )
    idle = IdleEngine(step_time, budget, host_s)
    idle(other, tpot_s)  # what was walked before changes nothing

    def walk() -> float:
        if step_time.decode_seconds(1, prompt_tokens + 1) + host_s > tpot_s:
            return math.inf
        done, spent_s = 0, 0.0
        while done < prompt_tokens:
            chunk = min(budget, prompt_tokens - done)
            while chunk and step_time.seconds(Step.chunk(chunk, done)) + host_s > tpot_s:
                chunk -= 1
            if not chunk:
                return math.inf
            spent_s += step_time.seconds(Step.chunk(chunk, done)) + host_s
            done += chunk
        return spent_s

    assert idle(prompt_tokens, tpot_s) == pytest.approx(walk(), rel=1e-9)


# --- prefixes --------------------------------------------------------------------------------------------------

BLOCKS = Trace(
    "blocks",
    (
        TraceRequest(0.0, 100, 5, prefix_blocks=(0, 1)),
        TraceRequest(1.0, 130, 5, prefix_blocks=(0, 2, 3)),
        TraceRequest(2.5, 70, 5, prefix_blocks=(4, 5)),
    ),
    block_tokens=64,
)
WITH_PREFIXES = workload(prefixes=True)


def _offer(count: int, seed: int = 1) -> Offered:
    return offered(cell(count, seed=seed, workload=WITH_PREFIXES), trace=BLOCKS)


def test_blocks_of_the_trace_become_blocks_of_the_engine() -> None:
    """64 tokens are four blocks of 16; a block that the prompt does not fill is not there."""
    requests = list(_offer(30))
    blocks = {one.request.prompt_tokens: len(one.prefix_blocks) for one in requests}
    assert blocks == {100: 6, 130: 8, 70: 4}
    assert all(one.block_tokens == 16 for one in requests)


def test_prefixes_are_shared_inside_a_lap_only() -> None:
    """Rows keep their order; a lap shares no text with the one before."""
    requests = list(_offer(30))
    prompts = [one.request.prompt_tokens for one in requests]
    after = {100: 130, 130: 70, 70: 100}
    assert all(after[earlier] == later for earlier, later in itertools.pairwise(prompts))
    start = prompts.index(100)
    one, two, three = requests[start : start + 3]
    assert one.prefix_blocks[:4] == two.prefix_blocks[:4]
    assert not set(one.prefix_blocks[4:]) & set(two.prefix_blocks)
    assert not set(three.prefix_blocks) & {*one.prefix_blocks, *two.prefix_blocks}
    again = requests[start + 3]
    assert again.request.prompt_tokens == 100
    assert not set(again.prefix_blocks) & {*one.prefix_blocks, *two.prefix_blocks}


def test_a_row_in_the_place_of_another_shares_nothing() -> None:
    requests = offered(
        cell(300, workload=WITH_PREFIXES), lambda prompt, _: math.inf if prompt == 130 else 0.0, trace=BLOCKS
    )
    seen: Counter[int] = Counter()
    for one in requests:
        seen.update(one.prefix_blocks)
    assert max(seen.values()) == 1


def test_without_prefixes_no_blocks_are_offered() -> None:
    assert all(one.prefix_blocks == () for one in offered(cell(), trace=BLOCKS))


# --- what cannot be offered ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "trace", "message"),
    [
        (cell(rate_rps=0.0), LENGTHS, "rate_rps must be positive"),
        (cell(workload=workload(tiers=())), LENGTHS, "tiers: at least one"),
        (cell(workload=workload(tiers=(TIERS[0], TIERS[0]))), LENGTHS, "names must differ"),
        (cell(workload=workload(tiers=(replace(TIERS[0], share=0.0),))), LENGTHS, "share of t20 must be positive"),
        (cell(workload=workload(invert_at=1.5)), LENGTHS, "invert_at is a part"),
        (cell(workload=WITH_PREFIXES), LENGTHS, "no prefix blocks"),
        (cell(workload=WITH_PREFIXES), replace(BLOCKS, block_tokens=24), "no whole number of the engine's 16"),
        (
            cell(workload=workload(arrivals=Arrivals.TRACE)),
            Trace("flat", (TraceRequest(0.0, 1, 1),) * 3),
            "lengths only: offer it with Poisson",
        ),
    ],
)
def test_an_impossible_workload_is_refused(wrong: Cell, trace: Trace, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        offered(wrong, trace=trace)


def test_a_cell_names_its_trace() -> None:
    found = offered(cell(workload=workload(trace="uniform:10-20/1-5")))
    assert all(10 <= one.request.prompt_tokens <= 20 and 1 <= one.output_tokens <= 5 for one in found)
    assert found.mean_output_tokens == pytest.approx(3, abs=0.1)


def test_tiers_are_ordered_tight_to_loose() -> None:
    free = TierShare("free", Slo(None, None), 1.0)
    tiers = tier_set(Workload("lengths", (free, *reversed(TIERS))))
    assert [tier.name for tier in tiers.tiers] == ["t20", "t30", "t50", "t100", "free"]
    assert tiers.default == "free"
    assert tiers.best_effort is not None
