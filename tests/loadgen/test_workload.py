"""Planned loads: seeded, with the asked-for mix and prompts of exact length."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.prompts import TokenIdPrompts, WordPrompts
from scheduling.tiers import Slo
from workloads.arrivals import gamma, poisson
from workloads.mix import TierMix, TierShare, WorkloadError, parse_mix
from workloads.plan import PlannedRequest, Window, plan, synthetic_trace
from workloads.traces import Trace, TraceRequest

MIX = TierMix((TierShare("fast", Slo(0.5, 0.02), 1), TierShare("batch", Slo(None, None), 3)))


def request(prompt_tokens: int, index: int = 0, blocks: tuple[int, ...] = ()) -> PlannedRequest:
    return PlannedRequest(
        index, 0.0, "t", Slo(None, None), prompt_tokens, 5, prefix_blocks=blocks, block_tokens=16
    )


def test_poisson_has_the_rate_and_is_seeded() -> None:
    arrivals = poisson(50.0, 200.0, random.Random(3))
    assert arrivals == poisson(50.0, 200.0, random.Random(3))
    assert arrivals != poisson(50.0, 200.0, random.Random(4))
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert all(0 <= early <= late < 200 for early, late in itertools.pairwise(arrivals))
    gaps = [late - early for early, late in itertools.pairwise(arrivals)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, rel=0.05)


def test_gamma_has_the_burstiness() -> None:
    arrivals = gamma(50.0, 400.0, 2.5, random.Random(3))
    gaps = [late - early for early, late in itertools.pairwise(arrivals)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(2.5, rel=0.1)
    assert len(arrivals) == pytest.approx(20_000, rel=0.1)


@pytest.mark.parametrize(("rate", "cv"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_arrivals_refuse_nonsense(rate: float, cv: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        gamma(rate, 1.0, cv, random.Random(0))


def test_a_mix_is_read() -> None:
    mix = parse_mix("chat=0.7, fast=2:500/20 ,batch=0.3:-/-", {"chat": Slo(2.0, 0.05)})
    assert mix.shares == (
        TierShare("chat", Slo(2.0, 0.05), 0.7),
        TierShare("fast", Slo(0.5, 0.02), 2.0),
        TierShare("batch", Slo(None, None), 0.3),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one tier"),
        ("nope=1", "no SLO is known for 'nope'"),
        ("chat=x", "'chat=x' must read"),
        ("chat=1:50", "'chat=1:50' must read"),
        ("chat=1:0/50", "ttft_s must be a positive number"),
        ("chat=0", "share of chat must be positive"),
        ("chat=1,chat=2", "names must differ"),
        ("ch\u00e4t=1:1/1", "cannot be sent in a header"),
        ("a\nb=1:1/1", "cannot be sent in a header"),
    ],
)
def test_a_wrong_mix_is_named(text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        parse_mix(text, {"chat": Slo(2.0, 0.05)})


def test_a_plan_is_seeded_and_keeps_the_mix() -> None:
    trace = synthetic_trace(100.0, 100.0, 10, 5, seed=1)
    window = Window(10.0, 80.0, 10.0)
    planned = plan(trace, MIX, window, seed=5)
    assert planned == plan(trace, MIX, window, seed=5)
    assert planned != plan(trace, MIX, window, seed=6)
    shares = Counter(item.tier for item in planned)
    assert shares["fast"] / len(planned) == pytest.approx(0.25, abs=0.02)
    assert all(item.measured == (10.0 <= item.at_s < 90.0) for item in planned)
    assert all(item.slo == (Slo(0.5, 0.02) if item.tier == "fast" else Slo(None, None)) for item in planned)


def test_another_rate_puts_the_same_requests_in_the_same_tiers() -> None:
    slow = Trace("t", tuple(TraceRequest(index / 10, 10, 5) for index in range(200)))
    fast = Trace("t", tuple(TraceRequest(index / 20, 10, 5) for index in range(200)))
    window = Window(0.0, 100.0)
    tiers = [[item.tier for item in plan(trace, MIX, window, seed=2)] for trace in (slow, fast)]
    assert tiers[0] == tiers[1]


def test_a_plan_without_measured_requests_is_refused() -> None:
    trace = Trace("t", (TraceRequest(0.0, 1, 1),))
    with pytest.raises(WorkloadError, match="nothing arrives in the measured time"):
        plan(trace, MIX, Window(5.0, 5.0), seed=0)


@pytest.mark.parametrize(
    "values", [(-1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, float("inf")), (0.0, float("nan"), 0.0)]
)
def test_a_wrong_window_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(WorkloadError):
        Window(*values)


def test_some_answers_come_in_one_piece() -> None:
    trace = synthetic_trace(100.0, 20.0, 10, 5, seed=1)
    planned = plan(trace, MIX, Window(0.0, 20.0), seed=5, unstreamed_share=0.3)
    assert sum(not item.streamed for item in planned) / len(planned) == pytest.approx(0.3, abs=0.05)


@given(tokens=st.integers(1, 20_000), blocks=st.lists(st.integers(0, 50), max_size=12))
def test_a_prompt_has_exactly_its_tokens(tokens: int, blocks: list[int]) -> None:
    item = request(tokens, blocks=tuple(blocks))
    assert len(WordPrompts(7).text(item).split()) == tokens
    ids = TokenIdPrompts(7, 512).ids(item)
    assert len(ids) == tokens
    assert all(16 <= token < 512 for token in ids)


def test_the_template_and_the_ratio_are_allowed_for() -> None:
    assert len(WordPrompts(7).text(request(100), template_tokens=1).split()) == 99
    assert len(WordPrompts(7, 0.5).text(request(100)).split()) == 50
    assert len(WordPrompts(7).text(request(1), template_tokens=1).split()) == 1


def test_equal_blocks_are_equal_text_and_nothing_else_is() -> None:
    prompts = WordPrompts(7)
    first = prompts.text(request(40, 0, (3, 4))).split()
    second = prompts.text(request(40, 1, (3, 5))).split()
    assert first[:16] == second[:16]
    assert first[16] != second[16]
    alone = [prompts.text(request(40, index)).split() for index in (0, 1)]
    assert alone[0][0] != alone[1][0]
    ids = TokenIdPrompts(7, 512)
    assert ids.ids(request(40, 0, (3, 4)))[:16] == ids.ids(request(40, 1, (3, 5)))[:16]
