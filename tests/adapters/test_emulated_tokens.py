"""The emulated model's language: counting, texts and lengths."""

from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from adapters.emulated.prompts import Prompt
from adapters.emulated.tokens import (
    MEDIAN_OUTPUT_TOKENS,
    TOKEN_TEXT,
    VOCABULARY,
    WORDS,
    answer_key,
    answer_text,
    count_text,
    decode,
    draw_output_tokens,
    encode,
    first_word,
)


def test_the_words_are_distinct_and_printable() -> None:
    assert len(set(WORDS)) == 256
    assert all(word.isascii() and word.isalpha() for word in WORDS)
    # Nothing in them needs an escape in JSON: they are put between quotes as they are.
    assert all(b'"' not in text and b"\\" not in text for text in TOKEN_TEXT)


@given(st.integers(0, 255), st.integers(0, 300), st.integers(0, 300))
def test_an_answer_counts_as_many_tokens_as_it_has(first: int, start: int, length: int) -> None:
    text = answer_text(first, start, start + length)
    assert count_text(text) == length
    assert decode(encode(text.split())) == text.strip()


@given(st.text())
def test_ids_are_one_per_word_and_in_the_vocabulary(text: str) -> None:
    ids = encode(text.split())
    assert len(ids) == count_text(text)
    assert all(0 <= number < VOCABULARY for number in ids)


def test_texts_and_lengths_follow_the_key_alone() -> None:
    assert answer_key(1, "a", 0) == answer_key(1, "a", 0)
    assert len({first_word(answer_key(0, n)) for n in range(500)}) > 100
    drawn = [draw_output_tokens(answer_key(0, n)) for n in range(2000)]
    assert drawn == [draw_output_tokens(answer_key(0, n)) for n in range(2000)]
    assert min(drawn) >= 1
    assert abs(statistics.median(drawn) / MEDIAN_OUTPUT_TOKENS - 1) < 0.1


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 8))
def test_prefix_blocks_are_equal_exactly_as_far_as_the_prompts_are(
    left: list[int], right: list[int], block_tokens: int
) -> None:
    ours = Prompt.of(left, block_tokens).blocks
    theirs = Prompt.of(right, block_tokens).blocks
    assert len(ours) == len(left) // block_tokens
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * block_tokens
        assert (one == other) == (left[:end] == right[:end])
