"""Answer lengths: censored answers count, snapshots keep order, and nothing learned is still sensible."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.format import ProfileError
from profiles.lengths import LengthBook, SurvivalLengths

OBSERVATIONS = st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), max_size=60)


def _learned(observations: list[tuple[int, bool]], running: list[int] | None = None) -> SurvivalLengths:
    book = LengthBook()
    for tokens, finished in observations:
        book.observe("m", "chat", tokens, finished=finished)
    return book.snapshot("m", "chat", running or ())


def test_before_anything_was_learned_an_answer_has_some_hundred_tokens() -> None:
    nothing = LengthBook().snapshot("m", "chat")
    assert nothing.answers == 0
    assert nothing.remaining(0) == pytest.approx(256, rel=0.05)
    # A long one is expected to go on for longer than a short one: its kind is unknown.
    assert nothing.remaining(4000) > nothing.remaining(0)
    assert nothing.remaining(10**7) >= 1.0


def test_lengths_are_found() -> None:
    chance = random.Random(1)
    found = _learned([(max(round(chance.expovariate(1 / 400)), 1), True) for _ in range(3000)])
    # An exponential answer has no memory: the same is expected at every age.
    for generated in (0, 50, 400, 1000):
        assert found.remaining(generated) == pytest.approx(400, rel=0.15)
        assert found.remaining_quantile(generated, 0.5) == pytest.approx(400 * math.log(2), rel=0.2)
        assert found.remaining_quantile(generated, 0.9) == pytest.approx(400 * math.log(10), rel=0.2)


def test_fixed_lengths_run_down() -> None:
    found = _learned([(500, True)] * 400)
    assert found.remaining(0) == pytest.approx(500, rel=0.12)
    assert found.remaining(300) == pytest.approx(200, rel=0.25)
    assert found.remaining_quantile(300, 0.9) < 400


def test_censored_answers_do_not_shorten() -> None:
    chance = random.Random(2)
    lengths = [max(round(chance.expovariate(1 / 600)), 1) for _ in range(3000)]
    cut = [(min(length, 300), length <= 300) for length in lengths]
    honest = _learned(cut)
    naive = _learned([(tokens, True) for tokens, _ in cut])
    assert honest.remaining_quantile(0, 0.3) == pytest.approx(-600 * math.log(0.7), rel=0.15)
    assert honest.remaining(0) > 1.3 * naive.remaining(0)


def test_running_answers_count_at_once_and_are_not_kept() -> None:
    book = LengthBook()
    for _ in range(50):
        book.observe("m", "chat", 100, finished=True)
    alone = book.snapshot("m", "chat")
    beside = book.snapshot("m", "chat", [800] * 50)
    assert beside.remaining(0) > 2 * alone.remaining(0)
    assert book.snapshot("m", "chat") == alone


def test_a_change_is_followed() -> None:
    book = LengthBook()
    for _ in range(3000):
        book.observe("m", "chat", 1000, finished=True)
    for _ in range(3000):
        book.observe("m", "chat", 100, finished=True)
    assert book.snapshot("m", "chat").remaining(0) < 160


def test_a_tier_with_few_answers_leans_on_its_model() -> None:
    book = LengthBook()
    for _ in range(1000):
        book.observe("m", "batch", 2000, finished=True)
    assert book.snapshot("m", "chat").remaining(0) == pytest.approx(2000, rel=0.15)
    assert book.snapshot("other", "chat").remaining(0) == pytest.approx(256, rel=0.05)
    for _ in range(200):
        book.observe("m", "chat", 50, finished=True)
    assert book.snapshot("m", "chat").remaining(0) < 150
    assert book.snapshot("m", "batch").remaining(0) > 1500


def test_many_answers_leave_the_weights_in_range() -> None:
    book = LengthBook()
    for i in range(40_000):
        book.observe("m", "chat", 100 + i % 100, finished=True)
    found = book.snapshot("m", "chat")
    # Half of an endless stream's weight lies within one half-life of 500 answers.
    assert found.answers == pytest.approx(500 / math.log(2), rel=0.02)
    assert found.remaining(0) == pytest.approx(150, rel=0.15)


def test_what_was_learned_survives_a_restart() -> None:
    book = LengthBook()
    chance = random.Random(4)
    for _ in range(300):
        tier = chance.choice(["chat", "code"])
        book.observe("m", tier, chance.randint(1, 2000), finished=chance.random() < 0.8)
    again = LengthBook()
    again.restore(book.to_json())
    for tier in ("chat", "code", "new"):
        assert again.snapshot("m", tier) == book.snapshot("m", tier)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not saved lengths"),
        ("{}", "not saved lengths"),
        ('{"format": 7, "classes": []}', "format 7"),
        ('{"format": 1, "classes": [["m", "t", {"ended": [], "censored": []}]]}', "not saved lengths"),
    ],
)
def test_what_was_not_saved_here_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        LengthBook().restore(text)


@given(OBSERVATIONS, st.lists(st.integers(0, 5000), max_size=20), st.integers(0, 400_000))
def test_a_snapshot_keeps_order(observations: list[tuple[int, bool]], running: list[int], generated: int) -> None:
    found = _learned(observations, running)
    assert found.survival[0] == 1.0
    assert found.survival[-1] == 0.0
    assert all(a >= b for a, b in zip(found.survival, found.survival[1:], strict=False))
    quantiles = [found.remaining_quantile(generated, q) for q in (0.01, 0.1, 0.5, 0.9, 0.99)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] >= 1.0
    assert math.isfinite(quantiles[-1])
    assert 1.0 <= found.remaining(generated) < math.inf


@given(OBSERVATIONS, st.integers(0, 100_000))
def test_where_an_answer_ends_only_moves_out_as_it_goes_on(
    observations: list[tuple[int, bool]], generated: int
) -> None:
    found = _learned(observations)
    ends = [at + found.remaining_quantile(at, 0.5) for at in (generated, generated + 1, generated + 100)]
    assert ends == pytest.approx(sorted(ends), abs=1e-6)
