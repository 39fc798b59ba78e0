"""The ledger's sums and curves against walking every resident step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.residents import RECOUNT_TOKENS, Resident, expected_output_tokens
from scheduling.stored import Stored
from scheduling.tiers import Slo
from tests.scheduling.play import STEP_TIME, backend, cost_of, request
from tiergate_engine.steptime import RooflineStepTime

LENGTHS = FixedLength(50.0)


def resident(lease_id: str, now_s: float = 0.0, **changes: object) -> Resident:
    asked = request(lease_id, **changes)  # type: ignore[arg-type]  # a test's shorthand
    return Resident(lease_id, asked, cost_of(asked), LENGTHS, now_s, guest=False)


def decoding(ledger: Ledger, one: Resident, generated: int, now_s: float = 0.0) -> Resident:
    one.expected_first_s = now_s
    ledger.place(one, now_s)
    ledger.first_token(one.lease_id, now_s)
    one.advance(generated, now_s)
    ledger.refresh(now_s)
    return one


# --- peak KV -----------------------------------------------------------------------------------------------

people = st.lists(
    st.tuples(st.integers(1, 3000), st.integers(1, 400), st.integers(1, 3)), max_size=8
)  # KV now, tokens left, sequences


def peak_step_by_step(
    others: list[tuple[int, int, int]], newcomer: tuple[int, int, int] | None, foreign: int
) -> int:
    """The most KV at any step, each sequence growing by one token a step until it ends."""
    everybody = [*others, *([newcomer] if newcomer else [])]
    most = foreign + sum(kv for kv, _, _ in everybody)
    for step in range(max((left for _, left, _ in everybody), default=0) + 1):
        most = max(most, foreign + sum(kv + step * n for kv, left, n in everybody if step <= left))
    return most


def ledger_of(others: list[tuple[int, int, int]], foreign: int) -> Ledger:
    ledger = Ledger(backend())
    ledger.foreign = LoadVector(0, foreign, 0)
    for index, (kv, left, n) in enumerate(others):
        one = resident(f"r{index}", prompt_tokens=1, sequences=n)
        ledger.residents[one.lease_id] = one
        one.first_token = True
        one.kv_tokens, one.remaining_tokens = kv, float(left)
    ledger.refresh(0.0)
    return ledger


@given(people, st.tuples(st.integers(1, 4000), st.integers(1, 500)), st.integers(0, 5000))
def test_peak_kv_with_a_newcomer_is_exact_for_one_sequence(
    others: list[tuple[int, int, int]], newcomer: tuple[int, int], foreign: int
) -> None:
    prompt, output = newcomer
    ledger = ledger_of(others, foreign)
    assert ledger.peak_kv_with(prompt, output) == peak_step_by_step(others, (prompt, output, 1), foreign)
    if others:
        assert ledger.peak_kv_tokens == peak_step_by_step(others, None, foreign)


@given(people, st.tuples(st.integers(1, 4000), st.integers(1, 500)), st.integers(2, 4))
def test_peak_kv_with_several_sequences_is_never_too_low(
    others: list[tuple[int, int, int]], newcomer: tuple[int, int], sequences: int
) -> None:
    prompt, output = newcomer
    ledger = ledger_of(others, 0)
    exact = peak_step_by_step(others, (prompt * sequences, output, sequences), 0)
    told = ledger.peak_kv_with(prompt, output, sequences)
    assert exact <= told <= exact + (sequences - 1) * output


def test_an_empty_backend_holds_the_newcomer_only() -> None:
    ledger = Ledger(backend())
    assert ledger.peak_kv_with(100, 50) == 150
    assert ledger.peak_kv_with(100, 50, 3) == 450
    assert ledger.first_end_tokens() is None


# --- sums --------------------------------------------------------------------------------------------------


def test_sums_through_the_life_of_a_resident() -> None:
    ledger = Ledger(backend(kv_tokens=1000))
    assert ledger.idle
    one = resident("r1", sequences=2)
    one.expected_first_s = 0.02
    ledger.place(one, 0.0)
    assert (ledger.seqs, ledger.decodes, ledger.queued, ledger.queued_prefill_tokens) == (2, 0, 2, 200)
    assert (ledger.kv_tokens, ledger.decode_kv_tokens, ledger.peak_kv_tokens) == (200, 0, 300)
    assert ledger.floor_s == STEP_TIME.decode_seconds(3, 300)
    ledger.first_token("r1", 0.02)
    assert (ledger.seqs, ledger.decodes, ledger.queued, ledger.queued_prefill_tokens) == (2, 2, 0, 0)
    assert (ledger.kv_tokens, ledger.decode_kv_tokens) == (202, 202)
    assert ledger.kv_fraction() == pytest.approx(0.3)
    one.advance(40, 0.5)
    ledger.refresh(0.5)
    assert ledger.kv_tokens == 280
    assert ledger.first_end_tokens() == 10.0
    assert ledger.remove("r1", 0.6) is one
    assert ledger.remove("r1", 0.6) is None
    assert ledger.idle
    assert ledger.own_load() == LoadVector()
    assert (ledger.seqs, ledger.kv_tokens, ledger.peak_kv_tokens, ledger.stored.kv_tokens) == (0, 0, 0, 0)
    assert ledger.tightest_tpot_s == math.inf


def test_other_replicas_load_counts_but_is_not_ours() -> None:
    ledger = Ledger(backend())
    ledger.foreign = LoadVector(5, 4000, 300)
    ledger.refresh(0.0)
    assert (ledger.seqs, ledger.peak_kv_tokens, ledger.queued_prefill_tokens) == (5, 4000, 300)
    assert ledger.own_load().idle
    assert not ledger.idle
    decoding(ledger, resident("r1"), 1)
    assert ledger.seqs == 6
    own = ledger.own_load()
    assert (own.decodes, own.queued_prefill_tokens, own.residents) == (1, 0, {"fast": 1})
    assert own.peak_kv_tokens == 150


def test_a_new_profile_replaces_the_floor() -> None:
    ledger = Ledger(backend())
    before_s = ledger.floor_s
    ledger.backend = backend(step_time=RooflineStepTime(c0_s=0.5))
    ledger.refresh(0.0)
    assert ledger.floor_s > before_s


@given(people, st.tuples(st.integers(1, 3000), st.integers(1, 500), st.integers(1, 3)), st.integers(0, 5000))
def test_a_newcomer_adds_up_to_what_a_refresh_would_find(
    others: list[tuple[int, int, int]], newcomer: tuple[int, int, int], foreign: int
) -> None:
    prompt, output, sequences = newcomer
    added, whole = ledger_of(others, foreign), ledger_of(others, foreign)
    for ledger in (added, whole):
        one = resident("new", prompt_tokens=prompt, sequences=sequences, max_output_tokens=output)
        one.expected_first_s = 0.2
        ledger.place(one, 0.1)
    whole.refresh(0.1)
    # the peak is known at once (for several sequences from above), the curve when it is asked for
    assert added.peak_kv_tokens >= whole.peak_kv_tokens
    if sequences == 1:
        assert (added.peak_kv_tokens, added.floor_s) == (whole.peak_kv_tokens, whole.floor_s)
    assert added.first_end_tokens() == whole.first_end_tokens()
    assert_same(added, whole)


def assert_same(one: Ledger, other: Ledger, within_tokens: int = 0) -> None:
    """Equal in all that decisions read; peaks within some tokens."""
    for name in ("slack_floor", "queued_slack_floor"):
        assert dict(getattr(one, name)) == dict(getattr(other, name)), name
    named = [name for name in Ledger.__slots__ if not name.startswith("_")]
    apart = {"residents", "foreign", "backend", "slack_floor", "queued_slack_floor", "stored"}
    for name in Stored.__slots__:
        assert getattr(one.stored, name) == getattr(other.stored, name), name
    peaks = {"peak_kv_tokens", "peak_after_tokens", "floor_s"}
    reckoned = {"decode_step_s", "chunk_step_s", "chunk_room_tokens"}
    for name in {*named, *reckoned} - apart - peaks:
        assert getattr(one, name) == getattr(other, name), name
    for prompt, output in ((1, 1), (100, 7), (2000, 60), (10, 500)):
        assert abs(one.peak_kv_with(prompt, output) - other.peak_kv_with(prompt, output)) <= within_tokens
    assert abs(one.peak_kv_tokens - other.peak_kv_tokens) <= within_tokens


events = st.lists(
    st.tuples(st.sampled_from(["place", "first", "end", "progress"]), st.integers(0, 9), st.integers(1, 400)),
    max_size=40,
)
PACES = (Slo(0.5, 0.02), Slo(0.3, 0.05), Slo(None, 0.1), Slo(1.0, None), Slo(0.001, 0.02))


def play(happened: list[tuple[str, int, int]], all_streamed: bool, now_s: float) -> Ledger:
    ledger = Ledger(backend())
    for kind, which, number in happened:
        name = f"r{which}"
        if kind == "place" and name not in ledger.residents:
            streamed = all_streamed or which != 9
            slo = PACES[which % len(PACES)]
            one = resident(name, now_s, prompt_tokens=number, slo=slo, streamed=streamed)
            one.expected_first_s = number / 1000
            ledger.place(one, now_s)
        elif kind == "first":
            ledger.first_token(name, now_s)
        elif kind == "end":
            ledger.remove(name, now_s)
        elif kind == "progress":
            moved = [(one.lease_id, one.generated_tokens + number % 5) for one in ledger.residents.values()]
            ledger.progressed(moved, now_s)
    return ledger


@given(events, st.booleans())
def test_events_add_up_to_what_a_refresh_would_find(
    happened: list[tuple[str, int, int]], all_streamed: bool
) -> None:
    stepwise, refreshed = play(happened, all_streamed, 0.01), play(happened, all_streamed, 0.01)
    refreshed.refresh(0.01)
    # the curve is drawn anew only after some tokens: until then it is as far off as lengths are counted down
    assert_same(stepwise, refreshed, within_tokens=3 * RECOUNT_TOKENS * len(stepwise.residents))


# --- slack -------------------------------------------------------------------------------------------------


def test_the_slack_floor_is_the_least_of_each_pace() -> None:
    ledger = Ledger(backend())
    # Token n is due at 0.5 + 0.02 n (fast) and 1.0 + 0.05 n (mid).
    decoding(ledger, resident("a"), 10, now_s=0.3)
    decoding(ledger, resident("b"), 5, now_s=0.3)
    decoding(ledger, resident("c", tier="mid"), 4, now_s=0.3)
    floors = dict(ledger.slack_floor)
    assert floors == {0.02: pytest.approx(0.5 + 5 * 0.02 - 0.3), 0.05: pytest.approx(1.0 + 4 * 0.05 - 0.3)}
    assert ledger.tightest_tpot_s == 0.02


def test_a_resident_that_is_late_holds_nobody_back() -> None:
    ledger = Ledger(backend())
    decoding(ledger, resident("a"), 3, now_s=0.3)
    decoding(ledger, resident("b", tier="slow"), 3, now_s=0.3)
    late = ledger.residents["a"]
    late.advance(4, 0.9)  # due at 0.58
    ledger.refresh(0.9)
    assert late.lost
    assert ledger.tightest_tpot_s == 0.1
    assert [tpot_s for tpot_s, _ in ledger.slack_floor] == [0.1]
    late.advance(100, 0.95)
    ledger.refresh(0.95)
    assert late.lost, "what was late stays late"


def test_one_that_waits_for_its_first_token_past_its_deadline_holds_nobody_back() -> None:
    ledger = Ledger(backend())
    one = resident("a")
    one.expected_first_s = 0.2
    ledger.place(one, 0.0)
    ledger.refresh(0.4)
    assert dict(ledger.queued_slack_floor) == {0.02: pytest.approx(0.1)}
    ledger.refresh(0.6)
    assert one.lost
    assert not ledger.queued_slack_floor
    assert ledger.tightest_tpot_s == math.inf
    assert ledger.queued_prefill_tokens == 100, "its prompt is still ahead of others"


def test_slack_counts_from_when_a_resident_was_last_seen() -> None:
    ledger = Ledger(backend())
    decoding(ledger, resident("a"), 10, now_s=0.3)
    seen = ledger.slack_floor
    ledger.refresh(5.0)
    assert ledger.slack_floor == seen


def test_without_a_deadline_nobody_is_late() -> None:
    ledger = Ledger(backend())
    decoding(ledger, resident("a", tier="best"), 1)
    decoding(ledger, resident("b", slo=Slo(1.0, None)), 1)
    decoding(ledger, resident("c", slo=Slo(None, 0.05)), 1)
    assert ledger.slack_floor == ((0.05, math.inf),)
    assert ledger.tightest_tpot_s == 0.05
    assert ledger.chunk_room_tokens == math.inf
    assert ledger.own_load().slack == ()


def test_a_request_that_is_not_streamed_is_taken_to_run_at_the_backends_pace() -> None:
    ledger = Ledger(backend())
    one = resident("a", streamed=False, max_output_tokens=30)
    one.expected_first_s = 0.1
    ledger.place(one, 0.0)
    assert ledger.queued == 1
    ledger.step_s = 0.01
    ledger.refresh(0.155)
    assert (ledger.queued, ledger.decodes, one.generated_tokens) == (0, 1, 6)
    ledger.refresh(10.0)
    assert one.generated_tokens == 30


# --- the prefill queue's head ------------------------------------------------------------------------------


def test_the_queues_clock_starts_with_its_head_and_at_every_first_token() -> None:
    ledger = Ledger(backend())
    ledger.place(resident("a"), 1.0)
    ledger.place(resident("b"), 2.0)
    assert ledger.prefill_since_s == 1.0
    ledger.first_token("a", 3.0)
    assert ledger.prefill_since_s == 3.0
    ledger.place(resident("c"), 4.0)
    assert ledger.prefill_since_s == 3.0
    ledger.remove("b", 5.0)
    assert ledger.prefill_since_s == 5.0, "the one the engine may have been at is gone"


# --- what is expected --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "limit", "generated", "expected"),
    [
        (None, None, 0, 50.0),
        (None, 20, 0, 20.0),
        (10, None, 0, 10.0),
        (10, None, 4, 6.0),
        (10, None, 10, 40.0),  # it outlived its hint: what was learned counts
        (None, 20, 20, 1.0),
        (None, 20, 25, 1.0),
        (None, None, 500, 6.25),
    ],
)
def test_expected_output(hint: int | None, limit: int | None, generated: int, expected: float) -> None:
    asked = request("r", expected_output_tokens=hint, max_output_tokens=limit)
    assert expected_output_tokens(asked, LENGTHS, generated) == expected
