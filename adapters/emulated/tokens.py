"""The emulated model's language: what a token is, which tokens an answer has, and how many.

A prompt's text counts one token per whitespace-separated word, and a chat one more per message (its role).
Every token of an answer is a word from a fixed list behind one space, so that it carries printable text and an
answer of N tokens counts N tokens again as a prompt. Which words come is settled by the request's key alone.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable, Sequence

_ONSETS = ("b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "st", "tr", "pl")
_RHYMES = ("a", "en", "i", "or", "ul", "an", "e", "is", "ost", "ump", "ai", "ell", "ing", "ock", "une", "ard")
_SHUFFLE = 89  # odd, so that the multiples of it visit every word once

WORDS: tuple[str, ...] = tuple(
    _ONSETS[i & 15] + _RHYMES[i >> 4] for i in ((k * _SHUFFLE) & 255 for k in range(256))
)
"""The 256 words; a token id below 256 is its place in this list."""

WORD_MASK = 255
VOCABULARY = 65_536
"""Token ids are below this. An unknown word's id is a checksum, so it cannot be turned back into the word."""

TOKEN_TEXT: tuple[bytes, ...] = tuple(f" {word}".encode() for word in WORDS)
TOKEN_SIZES: tuple[int, ...] = tuple(sorted({len(text) for text in TOKEN_TEXT}))

_IDS = {word: number for number, word in enumerate(WORDS)}

MEDIAN_OUTPUT_TOKENS = 180.0
OUTPUT_SIGMA = 0.9


def count_text(text: str) -> int:
    """Tokens of a text: one per whitespace-separated word."""
    return len(text.split())


def encode(words: Iterable[str]) -> list[int]:
    """Token ids of words, one for each."""
    known = _IDS.get
    ids: list[int] = []
    for word in words:
        number = known(word)
        ids.append(256 + zlib.crc32(word.encode()) % (VOCABULARY - 256) if number is None else number)
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; an id outside the word list becomes `<id>`."""
    return " ".join(WORDS[i] if 0 <= i < 256 else f"<{i}>" for i in ids)


def first_word(key: int) -> int:
    """Where in the list an answer with this key begins. Token i of it is word (first + i) modulo 256."""
    return (key * 0x9E3779B1 >> 7) & WORD_MASK


def answer_text(first: int, start: int, end: int) -> str:
    """The text of tokens `start` to `end` (exclusive) of an answer that begins at word `first`."""
    return "".join(f" {WORDS[(first + i) & WORD_MASK]}" for i in range(start, end))


def answer_key(*parts: object) -> int:
    """A stable number from the parts that settle an answer (seed, request id, choice)."""
    return zlib.crc32("\x1f".join(map(str, parts)).encode())


def draw_output_tokens(key: int) -> int:
    """How long an answer with this key is by itself: log-normal, median 180 tokens, never under one.

    Real answer lengths are close to log-normal; the spread is that of conversational traces.
    """
    drawn = random.Random(key).lognormvariate(math.log(MEDIAN_OUTPUT_TOKENS), OUTPUT_SIGMA)
    return max(1, round(drawn))
