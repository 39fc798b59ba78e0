"""Engines that put several tokens into one event: how it is noticed, and what is counted then.

An event counts one token, which undercounts when an engine's API server falls behind and joins what waits. The
engine's final `usage` is exact but comes last. Until then the length of the text tells: how many bytes of it make
a token is learned per model from streams whose usage came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_DECAY = 0.95  # a stream's weight halves after about 14 others
_STREAMS = 4  # before so many have ended, nothing is concluded from text
_DEVIATIONS = 3.0
_LEAST_WIDE = 1.3  # times the mean: streams of one model differ by so much anyway
_FEW_TOKENS = 8  # shorter answers say little of a model's tokens


@dataclass(frozen=True, slots=True)
class TextRate:
    """A model's bytes of text per token. Beyond `wide_bytes` an event, events must carry several tokens."""

    bytes_per_token: float = math.inf
    wide_bytes: float = math.inf


UNKNOWN_RATE = TextRate()


class _Seen:
    """Sums over the streams of one model that forget."""

    __slots__ = ("bytes", "square", "streams", "sum", "tokens", "weight")

    def __init__(self) -> None:
        self.bytes = self.tokens = self.weight = self.sum = self.square = 0.0
        self.streams = 0

    def add(self, text_bytes: int, tokens: int) -> None:
        rate = text_bytes / tokens
        self.bytes = self.bytes * _DECAY + text_bytes
        self.tokens = self.tokens * _DECAY + tokens
        self.weight = self.weight * _DECAY + 1.0
        self.sum = self.sum * _DECAY + rate
        self.square = self.square * _DECAY + rate * rate
        self.streams += 1

    def rate(self) -> TextRate:
        mean = self.sum / self.weight
        deviation = math.sqrt(max(self.square / self.weight - mean * mean, 0.0))
        each = self.bytes / self.tokens
        return TextRate(each, max(each * _LEAST_WIDE, each + _DEVIATIONS * deviation))


class TextRates:
    """What a token's text measures, per model. One per gateway."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._rates: dict[str, TextRate] = {}

    def of(self, model: str) -> TextRate:
        """What is known; `UNKNOWN_RATE`, which concludes nothing, before a few streams have ended."""
        return self._rates.get(model, UNKNOWN_RATE)

    def learn(self, model: str, text_bytes: int, tokens: int) -> None:
        """A stream ended whose engine said how many tokens its text was."""
        if tokens < _FEW_TOKENS or text_bytes <= 0:
            return
        seen = self._seen.setdefault(model, _Seen())
        seen.add(text_bytes, tokens)
        if seen.streams >= _STREAMS:
            self._rates[model] = seen.rate()
