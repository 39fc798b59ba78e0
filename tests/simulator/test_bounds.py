"""No schedule beats a bound: by hand, against the reference, and against engines driven at random."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, minimize

from profiles.catalogue import load
from scheduling.backends import EngineLimits
from scheduling.tiers import Slo
from simulator.bounds import Bound, BoundExceededError, EngineKind, check_not_above, upper_bound
from simulator.minorant import Floats, Minorant
from simulator.pricing import Phase, Sample, costs_s
from simulator.reference import needs_of, reference, with_fixed_s
from simulator.requests import SimRequest
from simulator.scenario import Form
from tests.simulator.offers import LIMITS, LINEAR, offer, papers_mix
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime

LENGTHS = [(900, 120), (1500, 40), (300, 300), (2500, 20), (60, 200)]
WIDE = EngineLimits(max_running_seqs=5_000, max_batched_tokens=200_000)
STRAIGHT = Minorant(0.005, 20e-6, 50e-6, 30e-9, 1e-9)
H200 = load("h200-llama-3.1-8b-bf16").step_time


def bound_of(requests: Sequence[SimRequest], step_time: StepTime = LINEAR, count: int = 4) -> Bound:
    return upper_bound(requests, [EngineKind(step_time, LIMITS, count)])


def sample_of(prompt: int, output: int, slo: Slo, *, streamed: bool = True) -> Sample:
    return Sample.of([offer(0, prompt, output, slo, streamed=streamed)])


def cost_s(sample: Sample, minorant: Minorant = STRAIGHT, phase: Phase = Phase.BOTH) -> float:
    return float(costs_s(minorant, sample, sample.tokens, phase)[0])


# --- by hand -----------------------------------------------------------------------------------------------


def test_one_token_answers_by_hand() -> None:
    # The prompt is one step of at most TTFT: its share of the fixed 5 ms is what it takes of such a step.
    prefill = 1000 * 20e-6 + 1e-9 * 1000**2 / 2
    assert cost_s(sample_of(1000, 1, Slo(0.3, 0.05))) == pytest.approx(prefill * (1 + 0.005 / (0.3 - 0.005)))
    # A step holds 4,096 tokens at most, hence the fixed 5 ms are shared by no more.
    requests = [offer(i, 1000, 1, Slo(0.3, 0.05), arrival_s=i / 100) for i in range(500)]
    found = bound_of(requests, count=2).long_run_rps(1.0)
    assert found == pytest.approx(2 / (prefill + 0.005 * 1000 / 4096), rel=2e-3)
    # Without that limit the promise limits the step.
    wide = upper_bound(requests, [EngineKind(LINEAR, WIDE, 2)]).long_run_rps(1.0)
    assert wide == pytest.approx(2 / (prefill * 0.3 / 0.295), rel=2e-3)


def test_without_a_pace_decodes_have_no_fixed_part() -> None:
    prefill = 1000 * 20e-6 + 1e-9 * 1000**2 / 2
    decode = sum(50e-6 + 30e-9 * (1000 + j) for j in range(1, 100))
    cost = cost_s(sample_of(1000, 100, Slo(0.3, None)))
    assert cost == pytest.approx(decode + prefill * 0.3 / 0.295)
    # Nor has the prompt, when the first token is not waited for either.
    assert cost_s(sample_of(1000, 100, Slo(0.3, None), streamed=False)) == pytest.approx(decode + prefill)
    unpaced = [offer(i, 1000, 100, Slo(0.3, None), arrival_s=i / 9, streamed=i % 2 == 0) for i in range(40)]
    ceiling = bound_of(unpaced).ceiling(1.0)
    assert 0.0 < ceiling.long_run_rps < ceiling.run_rps


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(0.3, 0.02), (1.0, 0.02), (0.06, 0.05), (0.5, 0.1)])
def test_the_price_is_the_least_over_all_lengths_of_steps(ttft_s: float, tpot_s: float) -> None:
    prompt, output = 800, 8
    weights = np.array(
        [prompt * 20e-6 + 1e-9 * prompt**2 / 2, *(50e-6 + 30e-9 * (prompt + j) for j in range(1, output))]
    )
    window_s = ttft_s + (output - 1) * tpot_s

    def price(lengths: Floats) -> float:
        return float((weights * lengths / (lengths - 0.005)).sum())

    found = minimize(
        price,
        np.full(output, 0.9 * min(ttft_s, window_s / output)),
        bounds=Bounds(np.full(output, 0.0051), np.array([ttft_s, *[window_s] * (output - 1)])),
        constraints=LinearConstraint(np.ones((1, output)), -np.inf, window_s),
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    own = cost_s(sample_of(prompt, output, Slo(ttft_s, tpot_s)))
    assert own <= found.fun * (1 + 1e-6)
    assert own == pytest.approx(found.fun, rel=1e-3)


def test_what_no_engine_serves_in_time_costs_infinitely_much() -> None:
    assert math.isinf(cost_s(sample_of(1000, 10, Slo(0.020, 0.05))))  # 25 ms of prefill
    assert math.isinf(cost_s(sample_of(1000, 1000, Slo(0.3, 0.0045))))  # a step takes more than 5 ms
    assert math.isfinite(cost_s(sample_of(1000, 10, Slo(0.027, 0.05))))
    # Judged by the last token alone, the first may be late.
    assert math.isfinite(cost_s(sample_of(1000, 10, Slo(0.020, 0.05), streamed=False)))
    requests = [offer(i, 1000, 10, Slo(0.02 if i == 3 else 0.3, 0.05), arrival_s=i / 10) for i in range(10)]
    found = bound_of(requests)
    assert found.long_run_rps(1.0) == found.ceiling(0.95).run_rps == 0.0
    assert found.long_run_rps(0.9) > 0.0
    assert found.tiers()[0].hopeless == pytest.approx(0.1)


def test_phases_add_up_to_less_than_both() -> None:
    sample = sample_of(800, 40, Slo(0.3, 0.03))
    parts = [cost_s(sample, phase=phase) for phase in (Phase.PREFILL, Phase.DECODE)]
    whole = cost_s(sample)
    assert max(parts) < sum(parts) <= whole < 1.3 * sum(parts)


def test_two_kinds_of_engines_by_hand() -> None:
    # One-token answers without attention: a twice as fast engine counts twice.
    slow = RooflineStepTime(per_token_s=20e-6)
    fast = RooflineStepTime(per_token_s=10e-6)
    requests = [offer(i, 1000, 1, Slo(0.3, 0.05), arrival_s=i / 100) for i in range(200)]
    kinds = [EngineKind(slow, LIMITS, 3), EngineKind(fast, LIMITS, 2)]
    assert upper_bound(requests, kinds).long_run_rps(1.0) == pytest.approx(3 * 50 + 2 * 100, rel=5e-3)


def test_host_time_counts_for_steps_and_sequences() -> None:
    requests = [offer(i, 1000, 50, Slo(0.3, 0.05), arrival_s=i / 100) for i in range(200)]
    bare = upper_bound(requests, [EngineKind(LINEAR, LIMITS, 4)]).long_run_rps(1.0)
    for kind in (EngineKind(LINEAR, LIMITS, 4, 0.002, 0.0), EngineKind(LINEAR, LIMITS, 4, 0.0, 2e-5)):
        assert upper_bound(requests, [kind]).long_run_rps(1.0) < 0.99 * bare


def test_memory_binds_where_it_is_small() -> None:
    # With room for one resident at a time, every token takes a step of its own.
    requests = [offer(i, 1000, 101, Slo(1.0, 0.1), arrival_s=i / 10) for i in range(200)]
    tight = EngineKind(LINEAR, EngineLimits(256, 4096, 1120), 1)
    alone_s = sum(LINEAR.decode_seconds(1, 1000 + j) for j in range(1, 101))
    found = upper_bound(requests, [tight]).long_run_rps(1.0)
    assert 1 / (alone_s + 0.0205) <= found <= 1.1 / (alone_s + 0.0205)
    assert bound_of(requests, count=1).long_run_rps(1.0) > 5 * found


# --- order -------------------------------------------------------------------------------------------------


def test_bounds_are_ordered() -> None:
    found = bound_of(papers_mix(LENGTHS, 2000, 50.0, seed=1))
    rates = [found.ceiling(attainment) for attainment in (1.0, 0.99, 0.95, 0.9)]
    assert [r.long_run_rps for r in rates] == sorted(r.long_run_rps for r in rates)
    assert [r.run_rps for r in rates] == sorted(r.run_rps for r in rates)
    assert all(rate.run_rps >= rate.long_run_rps for rate in rates)
    each = found.ceiling(0.9, every_tier=True)
    assert rates[0].long_run_rps < each.long_run_rps <= rates[-1].long_run_rps
    assert rates[0].run_rps < each.run_rps <= rates[-1].run_rps
    shares = [found.most_attained(rate_rps) for rate_rps in (10.0, 100.0, 200.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert found.most_attained(rates[-1].long_run_rps * 0.9999) == pytest.approx(0.9, abs=2e-3)
    dropped = found.tiers()
    assert [tier.name for tier in dropped] == ["t0", "t1", "t2", "t3"]
    assert sum(tier.dropped * tier.requests for tier in dropped) == pytest.approx(200)


@pytest.mark.parametrize("step_time", [LINEAR, with_fixed_s(H200, 0.008)])
def test_more_slack_raises_the_bound(step_time: StepTime) -> None:
    kinds = [EngineKind(step_time, WIDE, 4)]
    rates = [
        upper_bound(papers_mix(LENGTHS, 300, 50.0, seed=2, slack=slack), kinds).long_run_rps(1.0)
        for slack in (1.0, 1.3, 3.0)
    ]
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize(
    "step_time", [LINEAR, H200, with_fixed_s(H200, 0.008), load("a100-llama-3.1-8b-bf16").step_time]
)
def test_the_reference_is_below_the_bound(step_time: StepTime, form: Form) -> None:
    requests = papers_mix(LENGTHS, 1500, 50.0, seed=3)
    packed = reference(step_time, LIMITS, needs_of(requests), form)
    split = packed.prefill_backends(20) if form is Form.DISAGGREGATED else None
    found = upper_bound(requests, [EngineKind(step_time, LIMITS, 20)], prefill_backends=split)
    slowest = packed.optimal_rate(20)
    if split is not None:  # whole engines: the slower side decides
        share = packed.prefill_share
        slowest = min(split / share, (20 - split) / (1 - share)) / packed.cost_s
    # A request on an engine that cannot serve it in time has no part in a reference of means.
    hopeless = sum(tier.hopeless * tier.requests for tier in found.tiers()) / found.requests
    assert 0.0 < slowest < found.long_run_rps(1.0 - hopeless - 1e-9)


def test_a_division_of_roles_only_lowers_the_bound() -> None:
    requests = papers_mix(LENGTHS, 300, 50.0, seed=4)
    whole = bound_of(requests, count=10).long_run_rps(1.0)
    kinds = [EngineKind(LINEAR, LIMITS, 10)]
    split = [upper_bound(requests, kinds, prefill_backends=n).long_run_rps(1.0) for n in (1, 5, 9)]
    assert max(split) <= whole
    assert split[0] < 0.5 * max(split)
    assert split[-1] < 0.5 * max(split)


def test_cached_prefixes_are_paid_once() -> None:
    prefix = tuple(range(50))
    plain = [offer(i, 1000, 20, Slo(0.5, 0.05), arrival_s=i / 10, prefix_blocks=prefix) for i in range(100)]
    kinds = [EngineKind(LINEAR, LIMITS, 4)]
    without = upper_bound(plain, kinds).long_run_rps(1.0)
    cached = upper_bound(plain, kinds, prefix_caching=True).long_run_rps(1.0)
    assert cached > 2 * without


# --- against engines ---------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Play:
    """Engines driven at random: who was in time, and how long it took."""

    engines: list[EngineModel]
    rng: random.Random
    waiting: list[SimRequest]
    times_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def run(self, drops: float) -> None:
        """Every engine serves a random part of the requests in a random manner."""
        parts: list[list[SimRequest]] = [[] for _ in self.engines]
        for sim in self.waiting:
            if self.rng.random() >= drops:
                self.rng.choice(parts).append(sim)
        for engine, part in zip(self.engines, parts, strict=True):
            self._serve(engine, part)

    def _serve(self, engine: EngineModel, part: list[SimRequest]) -> None:
        now_s, left = 0.0, list(part)
        held: list[SimRequest] = []
        most = engine.config.max_batched_tokens
        eager, steady = self.rng.random(), self.rng.choice([64, 256, 1024, most])
        while left or held or not engine.idle:
            while left and left[0].request.arrival_s <= now_s:
                held.append(left.pop(0))
            while held and (self.rng.random() < eager or engine.idle):
                sim = held.pop(self.rng.randrange(len(held)))
                request = sim.request
                spec = SequenceSpec(request.request_id, request.prompt_tokens, sim.output_tokens)
                engine.submit(spec, now_s)
            engine.set_budget(self.rng.choice([steady, steady, most]))
            step = engine.next_step(now_s)
            if step is None:
                now_s = left[0].request.arrival_s if left else now_s + 0.001
                continue
            now_s = step.ends_s
            for token in engine.finish_step(now_s):
                self.times_s.setdefault(token.sequence_id, []).append(now_s)

    def in_time(self, sim: SimRequest) -> bool:
        times_s = self.times_s.get(sim.request.request_id, [])
        request = sim.request
        return len(times_s) == sim.output_tokens and all(
            time_s <= request.slo.deadline_s(request.arrival_s, index) for index, time_s in enumerate(times_s)
        )


def played(seed: int, step_time: StepTime, *, kv_tokens: int, rate_rps: float, slack: float) -> tuple[Play, Bound]:
    rng = random.Random(seed)
    requests = papers_mix([(400, 30), (900, 12), (100, 60), (1500, 1), (30, 2)], 100, rate_rps, seed, slack)
    count = rng.randint(1, 3)
    config = EngineConfig(kv_tokens, 4096, max_running_seqs=64, max_batched_tokens=2048)
    play = Play([EngineModel(config, step_time) for _ in range(count)], rng, requests)
    play.run(drops=rng.choice([0.0, 0.3]))
    kind = EngineKind(step_time, EngineLimits(64, 2048, kv_tokens), count)
    return play, upper_bound(requests, [kind], rate_rps=rate_rps)


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from([LINEAR, H200, with_fixed_s(H200, 0.008)]),
    st.sampled_from([4_000, 100_000]),
    st.floats(20.0, 3000.0),
    st.floats(0.3, 20.0),
)
def test_random_schedules_never_beat_the_bound(
    seed: int, step_time: StepTime, kv_tokens: int, rate_rps: float, slack: float
) -> None:
    play, found = played(seed, step_time, kv_tokens=kv_tokens, rate_rps=rate_rps, slack=slack)
    attained = sum(map(play.in_time, play.waiting)) / len(play.waiting)
    check_not_above(found, rate_rps, attained)
    tiers = {sim.request.tier for sim in play.waiting}
    mine = {tier: [play.in_time(sim) for sim in play.waiting if sim.request.tier == tier] for tier in tiers}
    check_not_above(found, rate_rps, min(sum(each) / len(each) for each in mine.values()), every_tier=True)


def test_a_busy_engine_comes_near_the_bound() -> None:
    # All at once, no hurry, great batches: this is what the bound assumes, and it is not far above.
    requests = [offer(i, 300, 50, Slo(60.0, 1.0), arrival_s=i * 1e-6) for i in range(600)]
    config = EngineConfig(400_000, 4096, max_running_seqs=256, max_batched_tokens=4096)
    engine = EngineModel(config, LINEAR)
    for sim in requests:
        engine.submit(SequenceSpec(sim.request.request_id, 300, 50), 0.0)
    took_s = 0.0
    while (step := engine.next_step(took_s)) is not None:
        took_s = step.ends_s
        engine.finish_step(took_s)
    assert took_s < 60.0
    least_s = 600 / bound_of(requests, count=1).long_run_rps(1.0)
    assert 0.8 * took_s < least_s <= took_s
    # The same run, judged by last tokens that are due when it ended: possible, and not much sooner.
    for part, possible in ((1.0, True), (0.8, False)):
        slo = Slo(part * took_s, 1e-6)
        due = [offer(i, 300, 50, slo, arrival_s=i * 1e-6, streamed=False) for i in range(600)]
        found = upper_bound(due, [EngineKind(LINEAR, LIMITS, 1)], rate_rps=1e6)
        assert found.attainable(1e6, 1.0) is possible


def test_what_is_above_is_refused_with_both_rates() -> None:
    requests = papers_mix(LENGTHS, 1000, 50.0, seed=5)
    found = bound_of(requests)
    ceiling = found.ceiling(0.9)
    check_not_above(found, ceiling.run_rps * 0.99, 0.9)
    with pytest.raises(BoundExceededError, match=r"90\.0% of all requests attained"):
        check_not_above(found, ceiling.run_rps * 1.02, 0.9)
    each = found.ceiling(0.9, every_tier=True)
    with pytest.raises(BoundExceededError, match="every tier"):
        check_not_above(found, each.run_rps * 1.02, 0.9, every_tier=True)
    assert found.attainable(each.run_rps * 0.99, 0.9, every_tier=True)


# --- who counts --------------------------------------------------------------------------------------------


def test_only_measured_requests_with_a_promise_count() -> None:
    slo = Slo(0.5, 0.05)
    counted = [offer(i, 500, 20, slo, arrival_s=1 + i / 10) for i in range(50)]
    others = [offer(100, 500, 20, slo, measured=False), offer(101, 500, 20, Slo(None, None), arrival_s=9.0)]
    assert bound_of([others[0], *counted, others[1]]).requests == 50
    with pytest.raises(ValueError, match="none is measured"):
        bound_of(others)


def test_tokens_that_are_due() -> None:
    sample = Sample.of([offer(i, 100, 5, Slo(1.0, 0.5), streamed=i == 0) for i in range(2)])
    start_s = np.array([10.0, 10.0])
    due = [sample.due(now_s, start_s).tolist() for now_s in (10.9, 11.1, 11.6, 12.9, 13.1, 99.0)]
    assert due == [[0, 0], [1, 0], [2, 0], [4, 0], [5, 5], [5, 5]]


def test_engines_are_checked() -> None:
    requests = [offer(0, 10, 2, Slo(1.0, 0.1))]
    with pytest.raises(ValueError, match="at least one of each"):
        upper_bound(requests, [])
    with pytest.raises(ValueError, match="prefill_backends"):
        upper_bound(requests, [EngineKind(LINEAR, LIMITS, 2)], prefill_backends=2)
