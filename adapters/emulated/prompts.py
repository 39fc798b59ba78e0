"""Prompts as the engine sees them: a number of tokens, and what the leading blocks hold, for the prefix cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapters.emulated.errors import bad_request
from adapters.emulated.protocol import Message
from adapters.emulated.tokens import encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `counted` says that the client gave token ids, so that the count is its own.

    `units` is what stands for its tokens: words, or token ids.
    """

    units: Sequence[str] | Sequence[int]
    counted: bool

    @property
    def tokens(self) -> int:
        return len(self.units)

    def blocks(self, block_tokens: int) -> tuple[int, ...]:
        """An id for each whole block of the prompt; equal ids mean equal contents from the start on.

        A hash that only has to hold within one process; the last token is left out, since an engine always
        computes at least that one.
        """
        ids: list[int] = []
        before = 0
        for start in range(0, len(self.units) - block_tokens, block_tokens):
            before = hash((before, *self.units[start : start + block_tokens]))
            ids.append(before)
        return tuple(ids)

    def token_ids(self) -> list[int]:
        """Its tokens' ids."""
        return [unit if isinstance(unit, int) else encode(unit)[0] for unit in self.units]


def chat_prompt(messages: Iterable[Message]) -> Prompt:
    """A chat as one prompt: per message one token for the role, and the words of its text."""
    units: list[str] = []
    for message in messages:
        units.append(f"<|{message.role}|>")
        if isinstance(message.content, str):
            units.extend(message.content.split())
            continue
        for part in message.content or ():
            if isinstance(part, str):
                units.extend(part.split())
            elif part.type == "text":
                units.extend(part.text.split())
            else:
                raise bad_request(
                    f"This model does not support {part.type} input: it is an emulated text model.", "messages"
                )
    return Prompt(units, counted=False)


def completion_prompts(prompt: list[int] | list[list[int]] | str | list[str] | None, field: str) -> list[Prompt]:
    """The prompts of a completion or embedding: a text, several, token ids, or several lists of them."""
    if isinstance(prompt, str):
        return [Prompt(prompt.split(), counted=False)]
    prompts: list[Prompt] = []
    loose: list[int] = []
    for item in prompt or ():
        if isinstance(item, str):
            prompts.append(Prompt(item.split(), counted=False))
        elif isinstance(item, int):
            loose.append(item)
        else:
            prompts.append(Prompt(item, counted=True))
    if loose:
        prompts.append(Prompt(loose, counted=True))
    if not prompts or any(not one.units for one in prompts):
        raise bad_request("The prompt must not be empty.", field)
    return prompts
