"""KV that an engine takes for a request before its answer needs it (TGI; `EngineLimits.lease_tokens`).

Such an engine lets a request in when there is KV for its prompt and a lease of tokens of its answer. When those
are made, the request goes back into the queue with them as part of its prompt, and waits there for the next
lease: a stream stalls in the middle whenever others wait. So everybody is taken to hold what it holds by its
expected end, and no more is let in than there is room for. Then nobody waits in the engine, and a new lease is had
at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduling.backends import EngineLimits
from scheduling.requests import Request
from scheduling.residents import Resident


def own_kv_tokens(limits: EngineLimits, request: Request, output_tokens: float) -> int:
    """KV that a request holds by its end, with so long an answer from each of its sequences."""
    seqs, prompt_tokens = request.sequences, request.prompt_tokens
    if limits.lease_tokens is None:
        return int((prompt_tokens + output_tokens) * seqs)
    return limits.held_tokens(prompt_tokens, output_tokens, request.max_output_tokens) * seqs


def reserved_kv_tokens(limits: EngineLimits, residents: Iterable[Resident]) -> int:
    """KV that the residents hold by their ends, one beside the other; 0 where KV grows as it is needed."""
    if limits.lease_tokens is None:
        return 0
    return sum(
        [own_kv_tokens(limits, one.request, one.generated_tokens + one.remaining_tokens) for one in residents]
    )
