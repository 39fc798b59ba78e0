"""Prompts as the engine sees them: a number of tokens, and what the leading blocks hold, for the prefix cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapters.emulated.errors import bad_request
from adapters.emulated.protocol import Message
from adapters.emulated.tokens import encode

Units = Sequence[str] | Sequence[int]
"""What stands for a prompt's tokens: words, or token ids."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is kept of a prompt while it is served; its words are not.

    Attributes:
        counted: the client gave token ids, so that the count is its own.
        blocks: an id for each whole block, if the engine caches prefixes; equal ids mean equal contents from the
            start on. A hash that only has to hold within one process.
    """

    tokens: int
    counted: bool
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, units: Units, block_tokens: int | None) -> Prompt:
        """`block_tokens` is the size of a cached block, or None without a prefix cache."""
        counted = bool(units) and isinstance(units[0], int)
        blocks: list[int] = []
        if block_tokens is not None:
            if not counted:
                # a text's blocks are those of its token ids, by which a client may send the same prompt
                units = encode(str(unit) for unit in units)
            before = 0
            for start in range(0, len(units) - block_tokens + 1, block_tokens):
                before = hash((before, *units[start : start + block_tokens]))
                blocks.append(before)
        return cls(len(units), counted, tuple(blocks))


def chat_units(messages: Iterable[Message]) -> list[str]:
    """A chat's words: per message one token for the role, and the words of its text. Raises ApiError."""
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
    return units


def prompt_units(prompt: list[int] | list[list[int]] | str | list[str] | None, field: str) -> list[Units]:
    """The prompts of a completion or embedding: a text, several, token ids, or several lists of them.

    Raises ApiError when one is empty.
    """
    items: Sequence[str | int | list[int]] = [prompt] if isinstance(prompt, str) else prompt or []
    prompts: list[Units] = []
    loose: list[int] = []
    for item in items:
        if isinstance(item, str):
            prompts.append(item.split())
        elif isinstance(item, int):
            loose.append(item)
        else:
            prompts.append(item)
    if loose:
        prompts.append(loose)
    if not prompts or not all(prompts):
        raise bad_request("The prompt must not be empty.", field)
    return prompts
