"""How many tokens an answer will have: what the core may know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class LengthModel(Protocol):
    """A snapshot of what is known of one class's output lengths. Immutable; learned elsewhere."""

    def remaining(self, generated_tokens: int) -> float:
        """Expected tokens still to come, given that `generated_tokens` came and the answer goes on; >= 1."""
        ...

    def remaining_quantile(self, generated_tokens: int, quantile: float) -> float:
        """The same at a quantile in (0, 1); >= 1."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLength:
    """The prior before anything was learned: an answer has `mean_tokens`, and a late one soon ends."""

    mean_tokens: float = 256.0

    def remaining(self, generated_tokens: int) -> float:
        left = self.mean_tokens - generated_tokens
        return left if left > self.mean_tokens / 8 else max(self.mean_tokens / 8, 1.0)

    def remaining_quantile(self, generated_tokens: int, quantile: float) -> float:
        return self.remaining(generated_tokens) * (0.5 + quantile)
