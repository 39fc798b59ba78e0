"""What a step held, by what vLLM scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from tiergate_engine.step import Step
from tiergate_engine.vllm.promises import EngineRequest


class StepOutput(Protocol):
    """What is read of a step that vLLM scheduled: tokens by request and in all, and which are drafts."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]]


class Held(NamedTuple):
    """What a planned step is to hold.

    Attributes:
        decode_seqs, kv_tokens: its decodes, and their contexts with the token that each makes.
        prompts: those that may get a chunk.
    """

    decode_seqs: int
    kv_tokens: int
    prompts: Sequence[EngineRequest]


def step_of(output: StepOutput, requests: Mapping[str, EngineRequest], held: Held | None = None) -> Step:
    """What a step holds. Read behind vLLM's `schedule`, when the step's tokens count as computed.

    When `held` and the output agree in sequences and tokens, the decodes are those that were planned, and only the
    prompts are looked at: to look at all would be a third of what the plug-in costs.
    """
    scheduled = output.num_scheduled_tokens
    if held is None:
        return _step_of_all(scheduled, output, requests)
    chunks = [
        (tokens, one.num_computed_tokens - tokens)
        for one in held.prompts
        if (tokens := scheduled.get(one.request_id, 0))
    ]
    prompt_tokens = sum([tokens for tokens, _ in chunks])
    seqs = held.decode_seqs
    if len(scheduled) != seqs + len(chunks) or output.total_num_scheduled_tokens != seqs + prompt_tokens:
        return _step_of_all(scheduled, output, requests)
    return Step(
        prompt_tokens,
        len(chunks),
        sum([before for _, before in chunks]),
        float(sum([tokens * (before + tokens / 2) for tokens, before in chunks])),
        seqs,
        held.kv_tokens,
    )


def _step_of_all(scheduled: Mapping[str, int], output: StepOutput, requests: Mapping[str, EngineRequest]) -> Step:
    """Every sequence looked at by itself."""
    prefill_tokens = prefill_seqs = prefill_context = decode_seqs = decode_kv = 0
    attention = 0.0
    drafts = output.scheduled_spec_decode_tokens
    for request_id, tokens in scheduled.items():
        one = requests[request_id]
        computed = one.num_computed_tokens
        before = computed - tokens
        if before >= one.num_prompt_tokens and (tokens == 1 or tokens == 1 + len(drafts.get(request_id, ()))):
            decode_seqs += 1
            decode_kv += computed
        else:
            prefill_tokens += tokens
            prefill_seqs += 1
            prefill_context += before
            attention += tokens * (before + tokens / 2)
    return Step(prefill_tokens, prefill_seqs, prefill_context, attention, decode_seqs, decode_kv)
