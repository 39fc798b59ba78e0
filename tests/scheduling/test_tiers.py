"""Tiers as bins of TPOT, deadlines, and how a request finds its tier."""

from __future__ import annotations

import math

import pytest

from scheduling.tiers import AskedSlo, OnMiss, Slo, Tier, TierSet, classify
from tests.scheduling.play import TIERS


def test_deadlines() -> None:
    slo = Slo(0.5, 0.02)
    assert [slo.deadline_s(10.0, index) for index in (0, 1, 10)] == pytest.approx([10.5, 10.52, 10.7])
    assert Slo(0.5, None).deadline_s(10.0, 0) == 10.5
    assert Slo(0.5, None).deadline_s(10.0, 1) == math.inf
    assert Slo(None, 0.02).deadline_s(10.0, 0) == math.inf
    assert Slo(None, None).promised is False


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_promise_is_a_positive_number(value: float) -> None:
    with pytest.raises(ValueError, match="ttft_s"):
        Slo(value, 0.02)
    with pytest.raises(ValueError, match="tpot_s"):
        Slo(0.5, value)


@pytest.mark.parametrize(
    ("tiers", "default", "message"),
    [
        ((), "a", "at least one"),
        ((Tier("a", Slo(1.0, 0.1), 0), Tier("a", Slo(1.0, 0.2), 1)), "a", "differ"),
        ((Tier("a", Slo(1.0, 0.1), 0),), "b", "default tier 'b'"),
        ((Tier("a", Slo(1.0, 0.1), 1),), "a", "rank"),
        ((Tier("a", Slo(1.0, 0.2), 0), Tier("b", Slo(1.0, 0.1), 1)), "a", "tight to loose"),
        ((Tier("a", Slo(1.0, None), 0), Tier("b", Slo(1.0, 0.1), 1)), "a", "tight to loose"),
    ],
)
def test_a_tier_set_is_checked(tiers: tuple[Tier, ...], default: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TierSet(tiers, default)


@pytest.mark.parametrize(
    ("tpot_s", "name"),
    [(0.001, "fast"), (0.02, "fast"), (0.049, "fast"), (0.05, "mid"), (0.099, "mid"), (5.0, "slow")],
)
def test_the_bin_of_a_tpot_is_the_loosest_that_is_as_tight(tpot_s: float, name: str) -> None:
    assert TIERS.for_tpot(tpot_s).name == name


def test_looking_up() -> None:
    assert TIERS["mid"].rank == 1
    assert "mid" in TIERS
    assert "none" not in TIERS
    with pytest.raises(KeyError):
        TIERS["none"]
    assert TIERS.tightest.name == "fast"
    assert TIERS.best_effort is TIERS["best"]
    assert TierSet((TIERS["fast"],), "fast").best_effort is None
    assert TIERS["best"].on_miss is OnMiss.RELEGATE


@pytest.mark.parametrize(
    ("asked", "tier", "slo"),
    [
        (AskedSlo(), "mid", Slo(1.0, 0.05)),
        (AskedSlo(tier="slow"), "slow", Slo(2.0, 0.1)),
        (AskedSlo(ttft_s=0.3), "mid", Slo(0.3, 0.05)),
        (AskedSlo(tpot_s=0.07), "mid", Slo(1.0, 0.07)),
        (AskedSlo(tpot_s=0.005), "fast", Slo(0.5, 0.005)),
        (AskedSlo(tier="slow", tpot_s=0.03), "fast", Slo(0.5, 0.03)),
        (AskedSlo(tier="fast", tpot_s=0.09), "fast", Slo(0.5, 0.09)),
        (AskedSlo(tier="best"), "best", Slo(None, None)),
    ],
)
def test_classify(asked: AskedSlo, tier: str, slo: Slo) -> None:
    granted = classify(asked, TIERS)
    assert (granted.tier.name, granted.slo) == (tier, slo)
    assert asked.stated == (asked != AskedSlo())


def test_classify_by_another_default_and_an_unknown_tier() -> None:
    assert classify(AskedSlo(), TIERS, "best").tier.name == "best"
    with pytest.raises(KeyError):
        classify(AskedSlo(tier="none"), TIERS)
