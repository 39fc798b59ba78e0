"""A request of a simulation: what a policy may know, and what only the engine does."""

from __future__ import annotations

from dataclasses import dataclass

from scheduling.requests import Request


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request and the length its answer will really have.

    Attributes:
        prefix_blocks: ids of the prompt's leading blocks of `block_tokens` each; equal ids are equal text.
        measured: whether it counts in the score; warm-up and cool-down do not.
    """

    request: Request
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int = 16
    measured: bool = True
