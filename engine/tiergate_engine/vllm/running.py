"""Who runs in a vLLM, by what they want of the next step. Most of what a plan costs is spent here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiergate_engine.vllm.content import Held
from tiergate_engine.vllm.promises import EngineRequest


class Running:
    """The running sequences, sorted; the decodes are `tiergate_engine.drive.Decodes`.

    Attributes:
        decodes: one token each, or a few with speculation.
        prefills: prompts that are being served.
        done: nothing more to schedule: their last token is on its way.
        decode_tokens: of all decodes, drafts included.
        kv_tokens: of each decode.
        least_slack_s: of the decodes.
    """

    __slots__ = ("_due_s", "_free_s", "decode_tokens", "decodes", "done", "kv_tokens", "least_slack_s", "prefills")

    def __init__(
        self,
        decodes: list[EngineRequest],
        prefills: list[EngineRequest],
        done: list[EngineRequest],
        free_s: float,
        *,
        drafts: bool,
    ) -> None:
        self.decodes = decodes
        self.prefills = prefills
        self.done = done
        self.decode_tokens = len(decodes)
        if drafts:
            self.decode_tokens += sum([len(one.spec_token_ids) for one in decodes])
        self.kv_tokens = kv_tokens = [one.num_computed_tokens + 1 for one in decodes]
        self._free_s = free_s
        # The token that a step makes has the index of what the step reads, without the prompt.
        self._due_s = [
            one.tiergate_first_s + (kv - one.num_prompt_tokens) * one.tiergate_pace_s
            for one, kv in zip(decodes, kv_tokens, strict=True)
        ]
        self.least_slack_s = min(self._due_s, default=math.inf) - free_s

    def slacks_s(self) -> list[float]:
        """Of each decode."""
        free_s = self._free_s
        return [due_s - free_s for due_s in self._due_s]

    def paces_s(self) -> list[float]:
        """Of each decode."""
        return [one.tiergate_pace_s or math.inf for one in self.decodes]

    def held(self, prompts: Sequence[EngineRequest], skipped: Sequence[int] = ()) -> Held:
        """What the next step holds without the decodes `skipped`, given by index, and with chunks of `prompts`."""
        kv_tokens = sum(self.kv_tokens) - sum([self.kv_tokens[index] for index in skipped])
        return Held(len(self.decodes) - len(skipped), kv_tokens, prompts)


def by_want(running: Sequence[EngineRequest], free_s: float, *, drafts: bool = True) -> Running:
    """Sort who runs, in the engine's order. `free_s`: when the next step begins; slack counts from then."""
    decodes = [one for one in running if not one.is_prefill_chunk]
    prefills = [] if len(decodes) == len(running) else [one for one in running if one.is_prefill_chunk]
    done = [
        one
        for one in decodes
        if (ahead := one.num_output_placeholders)
        and one.num_computed_tokens + 2 - ahead >= one.num_prompt_tokens + one.max_tokens  # as vLLM's loop has it
    ]
    if done:
        ended = set(done)
        decodes = [one for one in decodes if one not in ended]
    return Running(decodes, prefills, done, free_s, drafts=drafts)
