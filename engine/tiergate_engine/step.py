"""What one engine step holds, and how long it takes.

A *step* is one engine iteration: some decodes (one token each) and some prefill chunks, run as one batch.
Its cost is described by six sums (the fields of `Step`), which add up over sequences, so a batch is the sum
of its parts. The sums follow Dynamo's ForwardPassMetrics, plus the attention area of the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """The contents of one engine step, as sums over its sequences.

    ``prefill_context_tokens`` is the sum of the contexts already in KV before each chunk (p), and
    ``prefill_attention`` the sum of c * (p + c / 2): the query-key pairs the chunks of c tokens compute.
    ``decode_kv_tokens`` is the sum of the decodes' context lengths.
    """

    prefill_tokens: int = 0
    prefill_seqs: int = 0
    prefill_context_tokens: int = 0
    prefill_attention: float = 0.0
    decode_seqs: int = 0
    decode_kv_tokens: int = 0

    @classmethod
    def chunk(cls, tokens: int, context_tokens: int = 0) -> Step:
        """One prefill chunk of `tokens` tokens behind `context_tokens` tokens that are in KV already."""
        return cls(tokens, 1, context_tokens, tokens * (context_tokens + tokens / 2))

    @classmethod
    def decode(cls, seqs: int, kv_tokens: int) -> Step:
        """`seqs` decodes whose contexts sum to `kv_tokens`."""
        return cls(decode_seqs=seqs, decode_kv_tokens=kv_tokens)

    def with_chunk(self, tokens: int, context_tokens: int) -> Step:
        """This and a chunk of `tokens` tokens behind `context_tokens`: a sum that makes one object."""
        return Step(
            self.prefill_tokens + tokens,
            self.prefill_seqs + 1,
            self.prefill_context_tokens + context_tokens,
            self.prefill_attention + tokens * (context_tokens + tokens / 2),
            self.decode_seqs,
            self.decode_kv_tokens,
        )

    @property
    def tokens(self) -> int:
        """Batched tokens: what an engine's token budget counts."""
        return self.prefill_tokens + self.decode_seqs

    def __add__(self, other: Step) -> Step:
        return Step(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_seqs + other.prefill_seqs,
            self.prefill_context_tokens + other.prefill_context_tokens,
            self.prefill_attention + other.prefill_attention,
            self.decode_seqs + other.decode_seqs,
            self.decode_kv_tokens + other.decode_kv_tokens,
        )


class StepTime(Protocol):
    """How long a step takes, in seconds. Continuous and non-decreasing in every argument; immutable."""

    def seconds(self, step: Step) -> float:
        """Predicted duration of `step`; 0.0 for an empty one."""
        ...

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`: the hot path of every prediction."""
        ...

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """A step of decodes only: the steady state."""
        ...

    def chunk_tokens(self, base: Step, within_s: float, context_tokens: int, limit_tokens: int) -> int:
        """The inverse: the largest chunk that keeps a step within a time.

        The largest c in 0..`limit_tokens` such that `base` plus a chunk of c tokens behind `context_tokens`
        takes at most `within_s`; 0 when not even one token fits. Exact within one token.
        """
        ...
