"""What a prefix cache could save at best, whatever is scheduled where and when."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.requests import SimRequest


def free_tokens(requests: Sequence[SimRequest]) -> list[int]:
    """How many tokens of each prompt need not be computed if every block of text is computed once.

    The first request that has a block pays for it, in order of the sequence. So the tokens that any set of these
    requests must compute are at least the sum of what its members pay here, whichever of them really pays: a block
    that some member pays for here is a block of that set. The last token of a prompt is always computed.
    An id stands for a block's text and for all text before it, as in every trace format that has ids.
    """
    seen: set[int] = set()
    free = []
    for sim in requests:
        blocks = sim.prefix_blocks
        hit = 0
        for block in blocks:
            if block not in seen:
                break
            hit += 1
        seen.update(blocks)
        free.append(min(hit * sim.block_tokens, sim.request.prompt_tokens - 1) if hit else 0)
    return free
