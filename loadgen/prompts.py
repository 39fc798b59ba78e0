"""What is sent: prompts of a planned length, as words or as token ids."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from workloads.mix import WorkloadError
from workloads.plan import PlannedRequest

_SYLLABLES = (
    "bab",
    "dol",
    "fen",
    "gir",
    "kum",
    "lat",
    "mos",
    "nid",
    "pav",
    "rug",
    "sel",
    "tob",
    "vik",
    "wan",
    "zep",
)
_FILLER_WORDS = 4096
_WORD_CHARS = 4  # three letters and a space: the four characters a token that estimates assume


class WordPrompts:
    """Prompts of exactly N words: N tokens for the emulated engine, which counts words.

    For a real engine, `words_per_token` is the measured ratio. Every prompt begins with a word of its own, so that
    no prefix cache helps where the trace has no shared prefixes; with prefix blocks, equal ids give equal text.
    """

    __slots__ = ("_filler", "_ratio", "_seed")

    def __init__(self, seed: int, words_per_token: float = 1.0) -> None:
        if not (math.isfinite(words_per_token) and words_per_token > 0):
            raise WorkloadError(f"words per token must be positive, not {words_per_token!r}")
        rng = random.Random(f"{seed}:words")
        self._filler = "".join(f" {word}" for word in rng.choices(_SYLLABLES, k=_FILLER_WORDS))
        self._seed = seed
        self._ratio = words_per_token

    def text(self, request: PlannedRequest, template_tokens: int = 0) -> str:
        """The prompt of a request; `template_tokens` fewer, because the server adds them itself."""
        words = max(round((request.prompt_tokens - template_tokens) * self._ratio), 1)
        if not request.prefix_blocks or not request.block_tokens:
            return self._passage(f"r{self._seed}.{request.index}", words)
        block_words = max(round(request.block_tokens * self._ratio), 1)
        passages = []
        for block in request.prefix_blocks:
            if words <= 0:
                break
            passages.append(self._passage(f"b{block}", min(block_words, words)))
            words -= block_words
        if words > 0:
            passages.append(self._passage(f"r{self._seed}.{request.index}", words))
        return " ".join(passages)

    def _passage(self, first: str, words: int) -> str:
        whole, rest = divmod(words - 1, _FILLER_WORDS)
        return first + self._filler * whole + self._filler[: _WORD_CHARS * rest]


class TokenIdPrompts:
    """Prompts as lists of token ids: exact for any engine that takes them (vLLM's completions)."""

    __slots__ = ("_first_id", "_last_id", "_seed")

    def __init__(self, seed: int, vocabulary: int, first_id: int = 16) -> None:
        if vocabulary <= first_id:
            raise WorkloadError(f"the vocabulary must have more than {first_id} tokens, not {vocabulary}")
        self._seed = seed
        self._first_id = first_id
        self._last_id = vocabulary - 1

    def ids(self, request: PlannedRequest) -> Sequence[int]:
        """The prompt of a request."""
        ids: list[int] = []
        if request.block_tokens:
            for block in request.prefix_blocks:
                ids += self._passage(f"b{block}", request.block_tokens)
        del ids[request.prompt_tokens :]
        ids += self._passage(f"r{self._seed}.{request.index}", request.prompt_tokens - len(ids))
        return ids

    def _passage(self, name: str, count: int) -> list[int]:
        rng = random.Random(name)
        return rng.choices(range(self._first_id, self._last_id + 1), k=count)
