"""Reading what SGLang says of itself, in shape and out of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.sglang_state import ChunkRange, DecodeFit, Loads, Moments, Pace, ServerInfo

ODD: tuple[object, ...] = (
    None, True, 0, -1, 7, 10**400, 0.5, -0.5, math.inf, math.nan, "", "9", "x", [], [1], [[]], [1.0] * 6, {},
    {"a": 1}, {"chunked_prefill_size": {"now": 1, "least": "x"}}, {"token_capacity": -1},
)  # fmt: skip
ANYTHING = st.sampled_from(ODD)
LOAD_KEYS = (
    "timestamp", "num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens", "token_usage",
    "decode_moments", "total_prefill_uncached_tokens", "total_prefill_busy_us",
)  # fmt: skip
INFO_KEYS = (
    "internal_states", "dp_size", "pp_size", "max_running_requests", "chunked_prefill_size", "page_size",
    "version",
    "enable_priority_scheduling", "priority_scheduling_preemption_threshold", "memory_usage", "tiergate",
    "pp_max_micro_batch_size", "effective_max_running_requests_per_dp",
)  # fmt: skip


def odd(keys: tuple[str, ...]) -> st.SearchStrategy[dict[str, object]]:
    return st.dictionaries(st.sampled_from(keys), ANYTHING)


def moments_of(steps: list[tuple[int, float]]) -> Moments:
    """The sums of steps with so many sequences and so many microseconds."""
    return Moments(
        float(len(steps)),
        float(sum(seqs for seqs, _ in steps)),
        sum(time_us for _, time_us in steps),
        float(sum(seqs**2 for seqs, _ in steps)),
        sum(seqs * time_us for seqs, time_us in steps),
    )


class TestFit:
    @given(
        st.lists(st.integers(1, 256), min_size=2, max_size=50).filter(lambda seqs: len(set(seqs)) > 1),
        st.floats(100, 50_000),
        st.floats(0, 500),
    )
    def test_a_line_is_found_again(self, seqs: list[int], base_us: float, slope_us: float) -> None:
        fit = DecodeFit.of(moments_of([(one, base_us + slope_us * one) for one in seqs]))
        assert fit is not None
        assert fit.line is not None
        assert fit.steps == len(seqs)
        assert fit.line[0] == pytest.approx(base_us / 1e6, rel=1e-6, abs=1e-7)
        assert fit.line[1] == pytest.approx(slope_us / 1e6, rel=1e-6, abs=1e-8)

    def test_one_size_tells_a_mean_only(self) -> None:
        fit = DecodeFit.of(moments_of([(7, 1000.0), (7, 3000.0)]))
        assert fit == DecodeFit(2, 7.0, 0.002, None)

    def test_no_step(self) -> None:
        assert DecodeFit.of(Moments(0, 0, 0, 0, 0)) is None

    @given(
        st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9999)), min_size=1, max_size=20),
        st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9999)), min_size=1, max_size=20),
    )
    def test_the_steps_between(self, before: list[tuple[int, float]], then: list[tuple[int, float]]) -> None:
        early, late = moments_of(before), moments_of(before + then)
        assert late.since(early) == moments_of(then)
        assert early.since(late) is None


class TestLoads:
    @settings(max_examples=60)
    @given(st.lists(odd(LOAD_KEYS), max_size=3), ANYTHING)
    def test_nothing_is_an_error(self, ranks: list[dict[str, object]], stamp: object) -> None:
        loads = Loads.read({"loads": ranks, "timestamp": stamp})
        assert (loads is None) is (not ranks)
        for number in () if loads is None else (loads.running, loads.kv_used_fraction, loads.age_s):
            assert number is None or (number >= 0 and math.isfinite(number))

    @pytest.mark.parametrize("answer", ODD)
    def test_what_is_no_answer(self, answer: object) -> None:
        assert Loads.read({"loads": answer}) is None

    def test_a_rank_that_leaves_a_number_out_makes_it_unknown(self) -> None:
        loads = Loads.read({"loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1}, {"num_running_reqs": 3}]})
        assert loads is not None
        assert (loads.running, loads.waiting) == (5, None)

    @pytest.mark.parametrize(
        ("stamp", "age_s"),
        [
            ("1970-01-01T00:00:10Z", 5.0),
            ("1970-01-01T00:00:10+00:00", 5.0),
            ("1970-01-01T02:00:10+02:00", 5.0),
            ("1970-01-01T00:00:02Z", 0.0),
            ("1970-01-01T00:00:10", None),
            ("x", None),
        ],
    )
    def test_how_old_it_is(self, stamp: str, age_s: float | None) -> None:
        loads = Loads.read({"timestamp": stamp, "loads": [{"timestamp": 7.0}, {"timestamp": 5.0}]})
        assert loads is not None
        assert loads.age_s == age_s

    def test_one_that_has_not_decoded_yet(self) -> None:
        loads = Loads.read({"loads": [{"decode_moments": None}]})
        assert loads is not None
        assert loads.moments == Moments(0.0, 0.0, 0.0, 0.0, 0.0)

    def test_ranks_decode_together(self) -> None:
        one, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
        told = {"loads": [{"decode_moments": one}, {"decode_moments": None}, {"decode_moments": other}]}
        loads = Loads.read(told)
        assert loads is not None
        assert loads.moments == Moments(11.0, 22.0, 33.0, 44.0, 55.0)

    @pytest.mark.parametrize("told", [(), [], [1.0] * 4, "abcde", [1.0, None, 1.0, 1.0, 1.0]])
    def test_moments_out_of_shape(self, told: object) -> None:
        loads = Loads.read({"loads": [{"decode_moments": told}]})
        assert loads is not None
        assert loads.moments is None

    def test_a_server_that_began_anew_tells_no_pace(self) -> None:
        late = {"decode_moments": [9.0] * 6, "total_prefill_uncached_tokens": 9, "total_prefill_busy_us": 9}
        early = {"decode_moments": [2.0] * 6, "total_prefill_uncached_tokens": 2, "total_prefill_busy_us": 2}
        readings = [Loads.read({"loads": [one]}) for one in (late, early)]
        assert readings[0] is not None
        assert readings[1] is not None
        assert Pace.between(readings[0], readings[1]) == Pace(None, None)
        assert Pace.between(readings[1], readings[0]).prefill_token_s == 1e-6


class TestServerInfo:
    @settings(max_examples=60)
    @given(odd(INFO_KEYS), st.lists(odd(INFO_KEYS), max_size=3))
    def test_nothing_is_an_error(self, info: dict[str, object], states: list[dict[str, object]]) -> None:
        found = ServerInfo.read({**info, "internal_states": states})
        assert found.ranks >= 1
        assert found.stages >= 1

    def test_nothing_told(self) -> None:
        found = ServerInfo.read({})
        assert (found.cap_name, found.chunk, found.kv_tokens, found.schedules_by_priority) == (None,) * 4

    def test_the_older_name_of_the_cap(self) -> None:
        found = ServerInfo.read({"internal_states": [{"max_micro_batch_size": 9}]})
        assert (found.cap_name, found.cap) == ("max_micro_batch_size", 9)

    @pytest.mark.parametrize("other", [None, {}, {"now": 64, "least": 16, "most": 128}, {"now": 64, "least": 16}])
    def test_every_rank_has_to_have_the_plugin(self, other: object) -> None:
        sizes = {"now": 64, "least": 16, "most": 256, "multiple": 16}
        one = {"tiergate": {"chunked_prefill_size": sizes}}
        assert ServerInfo.read({"internal_states": [one, one]}).chunk == ChunkRange(64, 16, 256, 16)
        odd_one = {"tiergate": {"chunked_prefill_size": other}}
        assert ServerInfo.read({"internal_states": [one, odd_one]}).chunk is None


@given(st.integers(-5, 10_000) | st.none(), st.integers(1, 8), st.integers(1, 64), st.integers(0, 5000))
def test_a_chunk_that_is_asked_for_is_one_that_is_taken(
    tokens: int | None, least: int, multiple: int, more: int
) -> None:
    sizes = ChunkRange(multiple * least, multiple * least, multiple * least + more, multiple)
    nearest = sizes.nearest(tokens)
    assert sizes.least <= nearest <= sizes.most
    assert nearest % multiple == 0 or nearest == sizes.most
    assert (nearest == sizes.most) is (tokens is None or tokens >= sizes.most or sizes.most == sizes.least)
    assert tokens is None or nearest <= max(tokens, sizes.least)
