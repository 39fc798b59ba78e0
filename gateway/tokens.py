"""How many tokens a prompt has: exact where a tokenizer is configured, else learned characters per token."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gateway.config import ConfigError, TokenSettings

_DECAY = 0.98  # a request's weight halves after about 34 others
_PRIOR_TOKENS = 200.0
_THREAD_CHARS = 4_096  # beyond this, tokenizing in place would hold up other streams
_IMAGE_TOKENS = 600
_MESSAGE_TOKENS = 4  # role and separators of a chat template


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def count(self, text: str) -> int: ...


class FileTokenizer:
    """A tokenizer.json, read with the `tokenizers` package (extra `tokenizer`)."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Tokenizers  # noqa: PLC0415  (an optional extra)
        except ImportError:
            raise ConfigError("tokens.tokenizers needs the extra: pip install 'tiergate[tokenizer]'") from None
        try:
            self._tokenizer = Tokenizers.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (the package raises bare Exception for every bad file)
            raise ConfigError(f"tokens.tokenizers: {path}: {error}") from None

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class _Ratio:
    """Characters per token of one model, learned from `usage`: sums that forget."""

    __slots__ = ("chars", "tokens")

    def __init__(self, chars_per_token: float) -> None:
        self.chars = chars_per_token * _PRIOR_TOKENS
        self.tokens = _PRIOR_TOKENS

    def learn(self, chars: int, tokens: int) -> None:
        self.chars = self.chars * _DECAY + chars
        self.tokens = self.tokens * _DECAY + tokens


class TokenCounter:
    """Counts prompt tokens per model. One per gateway."""

    def __init__(self, settings: TokenSettings, tokenizers: Mapping[str, Tokenizer]) -> None:
        self._prior = settings.chars_per_token
        self.asks_engine = settings.engine
        self._tokenizers = tokenizers
        self._ratios: dict[str, _Ratio] = {}
        self._heard: dict[str, float] = {}

    def exact(self, model: str) -> bool:
        """Whether the model's own tokenizer is here."""
        return model in self._tokenizers

    def estimate(self, model: str, chars: int) -> int:
        """Tokens of `chars` characters by what was learned; at least 1 for a text that is not empty."""
        ratio = self._ratios.get(model)
        per_token = self._start(model) if ratio is None else ratio.chars / ratio.tokens
        return max(1, round(chars / per_token)) if chars else 0

    async def count(self, model: str, text: str) -> int:
        """Exact tokens of `text`. Raises KeyError without a tokenizer (see `exact`)."""
        tokenizer = self._tokenizers[model]
        if len(text) < _THREAD_CHARS:
            return tokenizer.count(text)
        return await asyncio.to_thread(tokenizer.count, text)

    def learn(self, model: str, chars: int, tokens: int) -> None:
        """An engine's `usage` said that `chars` characters were `tokens` tokens."""
        if chars <= 0 or tokens <= 0:
            return
        ratio = self._ratios.get(model)
        if ratio is None:
            ratio = self._ratios[model] = _Ratio(self._start(model))
        ratio.learn(chars, tokens)

    def learned(self) -> dict[str, float]:
        """Characters per token by model, to be saved."""
        return {model: ratio.chars / ratio.tokens for model, ratio in self._ratios.items()}

    def hear(self, others: Mapping[str, float]) -> None:
        """What other replicas found, by model: where a model begins that is not known here."""
        self._heard = dict(others)

    def _start(self, model: str) -> float:
        return self._heard.get(model, self._prior)

    def restore(self, learned: Mapping[str, float]) -> None:
        """What an earlier run learned."""
        for model, chars_per_token in learned.items():
            if 0.1 < chars_per_token < 100:
                self._ratios[model] = _Ratio(chars_per_token)


class PromptText:
    """What of a prompt costs tokens: its texts, images and message frames; or exact ids."""

    __slots__ = ("chars", "exact_tokens", "flat_tokens", "parts", "prompts")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.chars = 0
        self.flat_tokens = 0
        self.exact_tokens = 0
        self.prompts = 1

    def add_text(self, text: str) -> None:
        self.parts.append(text)
        self.chars += len(text)

    def add_image(self) -> None:
        self.flat_tokens += _IMAGE_TOKENS

    def add_message(self) -> None:
        self.flat_tokens += _MESSAGE_TOKENS

    def add_ids(self, count: int) -> None:
        self.exact_tokens += count

    async def tokens(self, model: str, counter: TokenCounter) -> int:
        """Tokens per prompt: exact with a tokenizer, else estimated."""
        if self.parts and counter.exact(model):
            text_tokens = await counter.count(model, "\n".join(self.parts))
        else:
            text_tokens = counter.estimate(model, self.chars)
        return max(1, (text_tokens + self.flat_tokens + self.exact_tokens + self.prompts - 1) // self.prompts)
