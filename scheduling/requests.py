"""A request as the core sees it."""

from __future__ import annotations

from dataclasses import dataclass

from scheduling.tiers import Slo


@dataclass(frozen=True, slots=True)
class Request:
    """One client request, classified. The true output length is not here: no policy may see it.

    Attributes:
        request_id: unique for ever; also the name of its lease's family.
        tier: name of the tier it is served in.
        slo: the pace granted (the tier's, or the client's own within it).
        prompt_tokens: tokens to prefill, per sequence, exact or estimated.
        cached_tokens: how many of them the engine is expected to have in its prefix cache.
        max_output_tokens: where the engine stops at the latest; None when the client set no limit.
        expected_output_tokens: the client's hint, if it gave one; else None (the length model answers).
        sequences: parallel answers (`n`, `best_of`, prompt lists): each decodes on its own.
        arrival_s: when its last byte came in, on the one clock.
        slo_stated: whether the client (or its key) asked for a pace. One that did not is never refused for it.
        streamed: judged token by token; otherwise by its last token.
        session: requests that share a prefix, if the client names one.
    """

    request_id: str
    model: str
    tier: str
    slo: Slo
    prompt_tokens: int
    arrival_s: float
    max_output_tokens: int | None = None
    expected_output_tokens: int | None = None
    cached_tokens: int = 0
    sequences: int = 1
    slo_stated: bool = True
    streamed: bool = True
    tenant: str = ""
    session: str | None = None
