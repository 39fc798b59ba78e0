"""Whole fleets on a virtual clock: the dispatcher in front of engine models with a measured profile.

Four Qwen3-32B engines on RTX PRO 6000 (emulated), tiers of 75, 100, 150 and 300 ms. Lengths are drawn here, shaped
like a chat trace: long-tailed prompts around a thousand tokens, answers around two hundred.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

import profiles
from scheduling import events as ev
from scheduling.backends import Backend, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.lengths import FixedLength
from scheduling.options import Options
from scheduling.policies import POLICIES, make
from scheduling.requests import Request
from scheduling.scoring import RequestEnd, score_predictions
from scheduling.tiers import Slo, Tier, TierSet
from simulator.fleet import FleetOptions, SimFleet
from simulator.requests import SimRequest
from simulator.scenario import Fault, FaultKind
from simulator.served import Served, SimResult
from tiergate_engine.model import EngineConfig, EngineModel

PROFILE = profiles.load("rtxpro6000-qwen3-32b-bf16")
TIERS = TierSet(
    (
        Tier("t75", Slo(1.5, 0.075), 0),
        Tier("t100", Slo(2.0, 0.100), 1),
        Tier("t150", Slo(3.0, 0.150), 2),
        Tier("t300", Slo(5.0, 0.300), 3),
    ),
    "t150",
)
LIMITS = EngineLimits(128, 512, 80_000, 16_000)
DURATION_S = 40.0
PLAIN = FleetOptions()


def requests(seed: int, rate: float, mix: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)) -> list[SimRequest]:
    rng = Random(seed)
    made: list[SimRequest] = []
    now_s = 0.0
    for index in itertools.count():
        now_s += rng.expovariate(rate)
        if now_s > DURATION_S:
            return made
        prompt = min(max(int(rng.lognormvariate(6.5, 0.9)), 10), 3000)
        output = min(max(int(rng.lognormvariate(4.9, 0.7)), 5), 400)
        tier = rng.choices(TIERS.tiers, mix)[0]
        asked = Request(f"r{index}", "m", tier.name, tier.slo, prompt, now_s, max_output_tokens=2048)
        made.append(SimRequest(asked, output))
    raise AssertionError


def dispatcher(policy: str, seed: int, backends: int = 4, margin: float = 1.0, driven: bool = False) -> Dispatcher:
    options = Options(handback_period_s=2.0, rebalance_period_s=5.0)
    made = Dispatcher(TIERS, make(policy, Random(seed)), options)
    for index in range(backends):
        engine = Backend(f"e{index}", PROFILE.step_time, limits=LIMITS, margin=margin, dynamic_chunk=driven)
        made.handle(ev.BackendChanged(engine), 0.0)
    for tier in TIERS.tiers:
        made.handle(ev.LengthsChanged("m", tier.name, FixedLength(180)), 0.0)
    return made


def fleet(policy: str, seed: int, backends: int = 4, replicas: int = 1, options: FleetOptions = PLAIN) -> SimFleet:
    config = EngineConfig(80_000, 16_000, max_running_seqs=128, max_batched_tokens=512)
    made = [dispatcher(policy, seed + index, backends, driven=options.driven) for index in range(replicas)]
    makers = {f"e{index}": lambda: EngineModel(config, PROFILE.step_time) for index in range(backends)}
    return SimFleet(made, makers, options)


def run(
    policy: str,
    seed: int,
    rate: float,
    backends: int = 4,
    replicas: int = 1,
    options: FleetOptions = PLAIN,
) -> tuple[SimResult, SimFleet]:
    """Served to the end, with conservation and true sums at every event."""
    sim = fleet(policy, seed, backends, replicas, options)

    def check() -> None:
        for replica in sim.replicas:
            assert replica.dispatcher.counts.conserved
            for ledger in replica.dispatcher.fleet:
                own = sum(one.sequences for one in ledger.residents.values())
                assert ledger.seqs == own + ledger.foreign.decodes

    asked = requests(seed, rate)
    result = sim.run(asked, check)
    assert len(result.served) == len(asked)
    return result, sim


def attained(served: Sequence[Served], tier: str | None = None) -> float:
    chosen = [one for one in served if tier is None or one.sim.request.tier == tier]
    return sum(one.attained for one in chosen) / len(chosen)


def rungs(result: SimResult) -> Counter[str]:
    return Counter("refused" if one.rung is None else one.rung.value for one in result.served)


def known(value: float | None) -> float:
    assert value is not None
    return value


@pytest.mark.parametrize("seed", [1, 2])
def test_tiers_are_served_better_than_by_round_robin_where_they_matter(seed: int) -> None:
    tiered, flat = run("polyserve", seed, 14.0)[0], run("round_robin", seed, 14.0)[0]
    print(f"seed {seed}: polyserve {attained(tiered.served):.3f}, round robin {attained(flat.served):.3f}")
    assert attained(tiered.served) > attained(flat.served) + 0.05
    assert attained(tiered.served, "t75") > attained(flat.served, "t75") + 0.2
    assert rungs(tiered)["own_tier"] > rungs(tiered)["promoted"] > 0
    assert set(rungs(flat)) <= {"routed", "refused"}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_ends_once_and_nothing_is_left(policy: str) -> None:
    result, sim = run(policy, 3, 18.0)
    counts = sim.dispatcher.counts
    assert counts.finished + counts.refused == counts.arrived == len(result.served)
    assert (counts.failed, counts.cancelled) == (0, 0)
    assert {one.end for one in result.served} <= {RequestEnd.FINISHED, RequestEnd.REFUSED}
    assert all(ledger.own_load().idle for ledger in sim.dispatcher.fleet)
    assert all(not engine.streams and engine.model.idle for engine in sim.engines.values())


def test_who_is_let_in_is_served_on_time() -> None:
    """Overload is answered by refusals, not by breaking what was promised."""
    result, _ = run("polyserve", 1, 22.0)
    finished = [one for one in result.served if one.end is RequestEnd.FINISHED]
    assert len(finished) < len(result.served)
    assert attained(finished) > 0.9


def test_an_easy_rate_is_served_completely_and_with_fewer_backends() -> None:
    result, _ = run("polyserve", 1, 2.0)
    assert attained(result.served) > 0.98
    assert rungs(result)["refused"] == 0
    assert result.busy_s < result.backend_seconds < 4 * result.ended_s


def test_first_tokens_come_when_they_were_predicted() -> None:
    result, _ = run("polyserve", 1, 12.0)
    pairs = [
        (one.predicted_ttft_s, one.ttft_s)
        for one in result.served
        if one.predicted_ttft_s is not None and one.ttft_s is not None
    ]
    told = score_predictions(pairs)
    median, worse = known(told.p50), known(told.p90)
    print(f"TTFT error P50 {median:.3f}, P90 {worse:.3f}, bias {known(told.bias):.3f}")
    assert median < 0.10
    assert worse < 0.30


def test_one_backend_serves_all_tiers() -> None:
    result, sim = run("polyserve", 1, 2.0, backends=1)
    assert all(attained(result.served, tier.name) > 0.6 for tier in TIERS.tiers)
    assert sim.dispatcher.counts.finished > 0.8 * sim.dispatcher.counts.arrived


@pytest.mark.parametrize("policy", ["polyserve", "random"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_same_seed_gives_the_same_run(policy: str, replicas: int) -> None:
    first, again = run(policy, 5, 10.0, replicas=replicas)[0], run(policy, 5, 10.0, replicas=replicas)[0]
    assert first == again
    other = run(policy, 6, 10.0, replicas=replicas)[0]
    assert other != first


def mean_tpot_s(result: SimResult, backend: str, from_s: float, to_s: float) -> float:
    """Of a backend's requests that arrived in a stretch of time."""
    return statistics.fmean(
        known(one.tpot_s)
        for one in result.served
        if one.backend == backend and one.tpot_s and from_s < one.sim.request.arrival_s < to_s
    )


# --- several replicas --------------------------------------------------------------------------------------


def test_replicas_share_the_work_and_the_truth() -> None:
    """Three replicas that know of each other at once serve about as well as one."""
    alone, together = run("polyserve", 1, 6.0)[0], run("polyserve", 1, 6.0, replicas=3)
    arrived = [replica.dispatcher.counts.arrived for replica in together[1].replicas]
    assert max(arrived) - min(arrived) <= 1
    assert attained(together[0].served) > attained(alone.served) - 0.03


def test_knowledge_that_is_old_misleads_predictions_and_costs_little() -> None:
    """What a decision did not know, the reservation refuses."""
    fresh = run("polyserve", 1, 10.0, replicas=3)[0]
    stale = run("polyserve", 1, 10.0, replicas=3, options=FleetOptions(view_age_s=2.0))[0]
    print(f"fresh {attained(fresh.served):.3f}, 2 s old {attained(stale.served):.3f}")
    assert ttft_error(stale) > 1.2 * ttft_error(fresh)
    assert attained(stale.served) > attained(fresh.served) - 0.05


def ttft_error(result: SimResult) -> float:
    """Median relative error of the predicted first token."""
    return statistics.median(
        abs(one.predicted_ttft_s / one.ttft_s - 1.0)
        for one in result.served
        if one.predicted_ttft_s is not None and one.ttft_s
    )


# --- faults, start-up, pace --------------------------------------------------------------------------------


def test_a_crash_loses_streams_that_began_and_moves_those_that_had_not() -> None:
    fault = Fault(0, FaultKind.DOWN, 10.0, 10.0)
    result, sim = run("round_robin", 2, 12.0, options=FleetOptions(faults=(fault,)))
    failed = [one for one in result.served if one.end is RequestEnd.FAILED]
    assert failed
    assert {(one.backend, one.reason, one.ended_s) for one in failed} == {("e0", "engine_down", 10.0)}
    placed = [
        one.sim.request.arrival_s
        for one in result.served
        if one.backend == "e0" and one.end is RequestEnd.FINISHED
    ]
    assert not [at_s for at_s in placed if 10.0 < at_s < 19.0]
    assert [at_s for at_s in placed if at_s > 20.0]
    assert sim.dispatcher.counts.failed == len(failed)
    assert all(ledger.own_load().idle for ledger in sim.dispatcher.fleet)


def test_a_slow_engine_costs_time_until_it_is_mended() -> None:
    fault = Fault(0, FaultKind.SLOW, 10.0, 10.0, factor=3.0)
    slow, whole = (
        run("round_robin", 2, 6.0, options=FleetOptions(faults=(fault,)))[0],
        run("round_robin", 2, 6.0)[0],
    )
    during = [mean_tpot_s(result, "e0", 10.0, 18.0) for result in (slow, whole)]
    after = [mean_tpot_s(result, "e0", 30.0, DURATION_S) for result in (slow, whole)]
    assert during[0] > 1.5 * during[1]
    assert after[0] < 1.2 * after[1]


def test_a_backend_from_the_pool_takes_its_time_to_start() -> None:
    at_once = run("polyserve", 4, 6.0)[0]
    slowly = run("polyserve", 4, 6.0, options=FleetOptions(startup_s=3.0))[0]
    first_s = [
        min(one.times.first_s for one in each.served if one.times and one.times.first_s)
        for each in (at_once, slowly)
    ]
    assert first_s[0] < 3.0 < first_s[1]
    assert attained(slowly.served) < attained(at_once.served)


def test_backends_of_a_policy_without_a_pool_run_from_the_start() -> None:
    started = run("qoserve_silo", 4, 6.0, options=FleetOptions(startup_s=30.0))[0]
    assert started.served == run("qoserve_silo", 4, 6.0)[0].served


def test_driven_engines_keep_the_pace_of_who_is_on_board() -> None:
    """Chunks are cut so that no step is longer than the tightest pace on board; only decodes always go."""
    sim = fleet("polyserve", 1, options=FleetOptions(driven=True))
    longest = {tier.name: 0.0 for tier in TIERS.tiers}

    def look() -> None:
        for name, engine in sim.engines.items():
            tier = sim.dispatcher.fleet[name].tier
            if tier is not None and engine.step_s is not None and engine.streams:
                longest[tier] = max(longest[tier], engine.step_s)

    result = sim.run(requests(1, 10.0), look)
    assert longest["t75"] < 0.0751
    assert longest["t100"] < 0.1001
    assert attained(result.served) > 0.93


def test_the_gradient_is_sampled() -> None:
    result, _ = run("polyserve", 1, 10.0, options=FleetOptions(sample_s=1.0))
    assert len(result.samples) >= DURATION_S
    for sample in result.samples:
        assert sum(map(len, sample.backends.values())) == 4
        assert all(list(loads) == sorted(loads, reverse=True) for loads in sample.backends.values())
    assert any("pool" in sample.backends for sample in result.samples)
