"""Whole fleets on a virtual clock: the dispatcher in front of engine models with a measured profile.

Four Qwen3-32B engines on RTX PRO 6000 (emulated), tiers of 75, 100, 150 and 300 ms. Lengths are drawn here, shaped
like a chat trace: long-tailed prompts around a thousand tokens, answers around two hundred.
"""

from __future__ import annotations

import itertools
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
from scheduling.scoring import RequestEnd, Score, score, score_predictions
from scheduling.tiers import Slo, Tier, TierSet
from simulator.fleet import SimFleet, SimRequest, SimResult
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


def fleet(policy: str, seed: int, backends: int = 4, margin: float = 1.0) -> SimFleet:
    options = Options(handback_period_s=2.0, rebalance_period_s=5.0)
    dispatcher = Dispatcher(TIERS, make(policy, Random(seed)), options)
    names = [f"e{index}" for index in range(backends)]
    for name in names:
        engine = Backend(name, PROFILE.step_time, limits=LIMITS, margin=margin)
        dispatcher.handle(ev.BackendChanged(engine), 0.0)
    for tier in TIERS.tiers:
        dispatcher.handle(ev.LengthsChanged("m", tier.name, FixedLength(180)), 0.0)
    config = EngineConfig(80_000, 16_000, max_running_seqs=128, max_batched_tokens=512)
    return SimFleet(dispatcher, {name: EngineModel(config, PROFILE.step_time) for name in names})


def run(policy: str, seed: int, rate: float, backends: int = 4) -> tuple[SimResult, Score, SimFleet]:
    """Served to the end, with conservation and non-negative load at every event."""
    sim = fleet(policy, seed, backends)
    dispatcher = sim.dispatcher

    def check() -> None:
        assert dispatcher.counts.conserved
        for ledger in dispatcher.fleet:
            assert ledger.seqs == sum(one.sequences for one in ledger.residents.values())

    asked = requests(seed, rate)
    result = sim.run(asked, check)
    assert len(result.records) == len(asked)
    return result, score(result.records, DURATION_S, [tier.name for tier in TIERS.tiers]), sim


def known(value: float | None) -> float:
    assert value is not None
    return value


@pytest.mark.parametrize("seed", [1, 2])
def test_tiers_are_served_better_than_by_round_robin_where_they_matter(seed: int) -> None:
    tiered, by_tier, _ = run("polyserve", seed, 14.0)
    flat, without, _ = run("round_robin", seed, 14.0)
    served, flatly = known(by_tier.attainment), known(without.attainment)
    print(f"seed {seed}: polyserve {served:.3f}, round robin {flatly:.3f}")
    assert served > flatly + 0.05
    tight = [known(scored.tiers[0].attainment) for scored in (by_tier, without)]
    assert tight[0] > tight[1] + 0.2
    assert tiered.outcomes["own_tier"] > tiered.outcomes["promoted"] > 0
    assert set(flat.outcomes) <= {"routed", "refused"}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_ends_once_and_nothing_is_left(policy: str) -> None:
    result, _, sim = run(policy, 3, 18.0)
    counts = sim.dispatcher.counts
    assert counts.finished + counts.refused == counts.arrived == len(result.records)
    assert (counts.failed, counts.cancelled) == (0, 0)
    ends = {record.end for record in result.records}
    assert ends <= {RequestEnd.FINISHED, RequestEnd.REFUSED}
    assert all(ledger.own_load().idle for ledger in sim.dispatcher.fleet)


def test_who_is_let_in_is_served_on_time() -> None:
    """Overload is answered by refusals, not by breaking what was promised."""
    result, _, _ = run("polyserve", 1, 22.0)
    finished = [record for record in result.records if record.end is RequestEnd.FINISHED]
    kept = score(finished, DURATION_S, [tier.name for tier in TIERS.tiers])
    assert len(finished) < len(result.records)
    assert known(kept.attainment) > 0.9


def test_an_easy_rate_is_served_completely_and_with_fewer_backends() -> None:
    result, scored, _ = run("polyserve", 1, 2.0)
    assert known(scored.attainment) > 0.98
    assert result.outcomes.get("refused", 0) == 0
    assert result.backend_seconds < 4 * result.ended_s


def test_first_tokens_come_when_they_were_predicted() -> None:
    result, _, _ = run("polyserve", 1, 12.0)
    told = score_predictions(result.ttft_pairs_s)
    median, worse = known(told.p50), known(told.p90)
    print(f"TTFT error P50 {median:.3f}, P90 {worse:.3f}, bias {known(told.bias):.3f}")
    assert median < 0.10
    assert worse < 0.30


def test_one_backend_serves_all_tiers() -> None:
    _, scored, sim = run("polyserve", 1, 2.0, backends=1)
    assert all(known(tier.attainment) > 0.6 for tier in scored.tiers)
    assert sim.dispatcher.counts.finished > 0.8 * sim.dispatcher.counts.arrived


@pytest.mark.parametrize("policy", ["polyserve", "random"])
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    first, again = run(policy, 5, 10.0), run(policy, 5, 10.0)
    assert first[0] == again[0]
    other = run(policy, 6, 10.0)
    assert other[0] != first[0]
