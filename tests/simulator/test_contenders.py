"""Contenders by name, and their knobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.checks import ALL_CHECKS, KvGrowth
from scheduling.options import Options
from scheduling.policies import POLICIES
from scheduling.policies.polyserve import PolyServe, Promotion
from scheduling.tiers import Slo, Tier, TierSet
from simulator.contenders import KNOBS, KnobInfo, UnknownContender, about, knobs_of, names, one_bin, setup_for
from simulator.scenario import Contender, Form, Knob
from simulator.setup import Setup
from tiergate_engine.drive import Rules


def made(name: str, **knobs: Knob) -> Setup:
    return setup_for(Contender(name, tuple(sorted(knobs.items()))))


def polyserve(**knobs: Knob) -> PolyServe:
    policy = made("polyserve_co", **knobs).policy(Random(1))
    assert isinstance(policy, PolyServe)
    return policy


@pytest.mark.parametrize("name", names())
def test_every_contender_is_ready_with_its_defaults(name: str) -> None:
    setup = made(name)
    policy = setup.policy(Random(1))
    assert policy.name in POLICIES, "it serves live too"
    assert setup.form is (Form.DISAGGREGATED if name.endswith("_pd") else Form.COLOCATED)
    assert setup.lengths == "mean"
    assert setup.margin == 1.0
    assert about(name)
    assert KNOBS[name] == knobs_of(name)
    defaults: dict[str, Knob] = {knob.name: knob.default for knob in knobs_of(name)}
    said = made(name, **defaults)
    assert (said.driven, said.chunk_tokens, said.options) == (setup.driven, setup.chunk_tokens, setup.options)


def test_every_live_policy_contends() -> None:
    assert {made(name).policy(Random(1)).name for name in names()} == set(POLICIES)


def test_the_default_is_the_papers_form_with_the_live_defaults() -> None:
    setup = made("polyserve_co")
    assert setup.policy(Random(1)) == PolyServe()
    assert setup.options == Options(rebalance_period_s=2.0, moves_per_round=64)
    assert setup.driven
    assert not made("polyserve_pd").driven


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"gradient": "emptiest"}, PolyServe(fullest_first=False)),
        ({"promotion": "eager"}, PolyServe(promotion=Promotion.EAGER)),
        ({"promotion": "never"}, PolyServe(promotion=Promotion.NEVER)),
        ({"promotion_order": "tightest"}, PolyServe(nearest_first=False)),
        ({"pool": False}, PolyServe(uses_pool=False)),
        ({"held_order": "fifo"}, PolyServe(held_by_deadline=False)),
    ],
)
def test_knobs_of_the_policy(knobs: dict[str, Knob], expected: PolyServe) -> None:
    assert polyserve(**knobs) == expected


def test_knobs_of_the_checks() -> None:
    assert polyserve().checks == ALL_CHECKS
    assert not polyserve(chunk_prediction="weak").checks.chunk_kept
    assert not polyserve(resident_slack=False).checks.resident_slack
    first, off = polyserve(wait_aware="first").checks, polyserve(wait_aware="off").checks
    assert (first.first_token, first.second_token) == (True, False)
    assert (off.first_token, off.second_token) == (False, False)
    assert [polyserve(kv_growth=growth.value).checks.kv_growth for growth in KvGrowth] == list(KvGrowth)


def test_knobs_of_the_dispatcher_and_the_engines() -> None:
    options = made("random", queue="scan", refusal=False).options
    assert (options.scan_held, options.overtaking, options.refuses) == (64, False, False)
    assert not made("random", queue="head").options.overtaking
    assert made("polyserve_co", handback_period_s=3, handback_checks=1).options.handback_period_s == 3.0
    assert made("co_chunk").chunk_tokens == 512
    assert made("co_chunk", chunk_tokens=4096).chunk_tokens == 4096
    assert made("random").chunk_tokens is None
    assert not made("polyserve_co", driven=False).driven
    assert made("qoserve_silo").driven
    assert made("minimal", lengths="known", margin=1.5).margin == 1.5


def test_engines_are_driven_by_the_mechanisms_that_are_on() -> None:
    mechanisms = ("chunk_from_slack", "deadline_order", "skip_loose", "relegate_late")
    assert all(made(name).drive is None for name in names()), "as published"
    everything: dict[str, Knob] = dict.fromkeys(mechanisms, True)
    assert made("polyserve_co", **everything).drive == Rules()
    assert made("lmetric", **everything).drive == Rules()
    for knob, rule in zip(mechanisms, ("chunk_from_slack", "deadline_order", "skip", "relegate"), strict=True):
        assert made("polyserve_co", **{**everything, knob: False}).drive == replace(Rules(), **{rule: False})
        alone = made("polyserve_co", **{knob: True}).drive
        assert alone is not None
        assert [getattr(alone, each) for each in ("chunk_from_slack", "deadline_order", "skip", "relegate")] == [
            each == knob for each in mechanisms
        ]


def test_a_pace_is_set_from_outside_unless_slack_sets_the_steps() -> None:
    assert made("polyserve_co").paced
    assert made("polyserve_co", deadline_order=True).paced
    assert not made("polyserve_co", chunk_from_slack=True).paced
    assert made("polyserve_co", chunk_from_slack=True).driven, "what the policy counts on"
    assert not made("polyserve_co", driven=False).paced


def test_prefill_backends_have_a_gradient_of_their_own() -> None:
    for gradient, fullest in (("emptiest", False), ("fullest", True)):
        setup = made("polyserve_pd", prefill_gradient=gradient)
        assert setup.prefill_policy is not None
        assert setup.prefill_policy(Random(1)) == PolyServe(fullest_first=fullest)
        assert setup.policy(Random(1)) == PolyServe()
    assert made("minimal_pd").prefill_policy is None


def test_without_binning_there_is_one_pool_at_the_tightest_pace() -> None:
    tiers = TierSet((Tier("a", Slo(0.3, 0.02), 0), Tier("b", Slo(1.0, 0.1), 1)), "b")
    assert made("polyserve_co").tiers(tiers) is tiers
    (mixed,) = made("polyserve_co", binning=False).tiers(tiers).tiers
    assert mixed.slo.tpot_s == 0.02
    assert one_bin(tiers).default == mixed.name


def test_the_generator_is_used() -> None:
    """Two replicas with the same seed agree; with another they do not."""
    setup = made("random")
    orders = []
    for seed in (1, 1, 2):
        policy = setup.policy(Random(seed))
        orders.append([policy.held_key.__self__._rng.random() for _ in range(3)])  # type: ignore[attr-defined]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("contender", "told"),
    [
        (Contender("polyserv_co"), "did you mean 'polyserve_co'"),
        (Contender("zzz"), "known: polyserve_co, "),
        (Contender("co_chunk", (("chunk_token", 1),)), "did you mean 'chunk_tokens'"),
        (Contender("random", (("driven", True),)), "unknown knob 'driven'"),
        (Contender("co_chunk", (("chunk_tokens", 0),)), "chunk_tokens must be at least 1, not 0"),
        (Contender("co_chunk", (("chunk_tokens", "x"),)), "chunk_tokens takes a int, not 'x'"),
        (Contender("co_chunk", (("chunk_tokens", True),)), "takes a int, not True"),
        (Contender("random", (("margin", 0.9),)), "margin must be at least 1"),
        (Contender("random", (("margin", float("nan")),)), "margin must be at least 1"),
        (Contender("polyserve_co", (("gradient", "up"),)), "one of fullest, emptiest, not 'up'"),
        (Contender("polyserve_co", (("pool", 1),)), "takes a bool, not 1"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(contender: Contender, told: str) -> None:
    with pytest.raises(UnknownContender, match=r"contender|knob") as caught:
        setup_for(contender)
    assert told in str(caught.value)


@given(st.data())
def test_any_choice_of_knobs_makes_a_setup(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names()))

    def value(knob: KnobInfo) -> st.SearchStrategy[Knob]:
        if knob.choices:
            return st.sampled_from(knob.choices)
        if isinstance(knob.default, bool):
            return st.booleans()
        if isinstance(knob.default, int):
            return st.integers(int(knob.least), 5000)
        return st.floats(knob.least, 100)

    chosen = data.draw(st.fixed_dictionaries({}, optional={knob.name: value(knob) for knob in knobs_of(name)}))
    setup = made(name, **chosen)
    assert setup.policy(Random(1)).name in POLICIES


def test_the_documents_tell_every_contender_and_knob() -> None:
    told = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    for name in names():
        assert f"`{name}`" in told or f"`{name.removesuffix('_co')}`" in told, name
        for knob in knobs_of(name):
            assert f"`{knob.name}`" in told, f"{name}: {knob.name}"
            for choice in knob.choices:
                assert str(choice) in told
