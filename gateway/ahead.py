"""Chunks from outside: a long prompt is sent ahead to an engine's prefix cache in pieces, then the request itself.

An engine that takes no chunk size computes as much of a prompt in one step as its budget allows, and its decodes
wait for that step. Sent ahead in growing prefixes, each of which finds the one before in the cache, a step carries
a chunk of it. Prefixes follow one another when the one before was answered, so decodes get a step in between; and
on one backend only one chunk is under way at a time, the most urgent request's first.

Nobody else is concerned: a prefix has no lease and no client. What goes wrong with one is not an error of its
request, which then goes as it is.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.contract import (
    Adapter,
    Capabilities,
    ComputesAhead,
    Failure,
    OutgoingRequest,
    PromptIds,
    Support,
    Unsupported,
    UpstreamError,
)
from gateway.config import BackendSettings
from gateway.relay import Opened, Outgoing, Relay
from gateway.request import Call
from gateway.teachers import BackendUnusable
from gateway.ticket import Ticket

log = logging.getLogger("tiergate.ahead")

_LEAST_LEFT_S = 0.001
_REMEMBERED = 256  # prefixes of an engine whose cache's size is not known


def prefix_lengths(prompt_tokens: int, chunk_tokens: int) -> range:
    """The prefixes of a prompt that are sent ahead; at most a chunk is left for the request itself."""
    return range(chunk_tokens, prompt_tokens, chunk_tokens)


def whole_blocks(tokens: int, block_tokens: int) -> int:
    """The largest multiple of a cache's block up to `tokens`, at least one block: only whole ones are kept."""
    return max(tokens // block_tokens, 1) * block_tokens


class Turns:
    """One chunk at a time on a backend. Those who wait get their turn by deadline, then as they came."""

    __slots__ = ("_count", "_taken", "_waiting")

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    async def take(self, due_ms: float) -> None:
        """Wait for the turn. Whoever has it gives it back."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (due_ms, next(self._count), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it came in the moment in which nobody wanted it any more
            raise

    def give_back(self) -> None:
        """The next one's turn."""
        while self._waiting:
            turn = heapq.heappop(self._waiting)[-1]
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False


class Sent:
    """Which prefixes a backend's cache should hold still: those that were sent last, up to half of what it has
    room for. A conversation's next prompt begins with them, and would be walked through for nothing.

    Where the cache has lost one after all, a step is longer than a chunk, and nothing else is wrong.
    """

    __slots__ = ("_most", "_names")

    def __init__(self, kv_tokens: int | None, chunk_tokens: int) -> None:
        self._most = _REMEMBERED if kv_tokens is None else max(kv_tokens // (2 * chunk_tokens), 1)
        self._names: OrderedDict[int, None] = OrderedDict()

    def longest(self, names: Sequence[int]) -> int:
        """How many of a prompt's prefixes, named from the shortest on, need not be sent."""
        known = next((count for count in range(len(names), 0, -1) if names[count - 1] in self._names), 0)
        for name in reversed(names[:known]):  # as vLLM does: a prompt's end is forgotten before its beginning
            self.add(name)
        return known

    def add(self, name: int) -> None:
        """It was sent, or found."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) > self._most:
            self._names.popitem(last=False)


def names_of(prompt: PromptIds, lengths: range) -> list[int]:
    """A name for each prefix of a prompt, equal where their contents are, within one process."""
    name = hash(tuple(sorted((key, str(value)) for key, value in prompt.keyed.items())))
    names: list[int] = []
    for end in lengths:
        name = hash((name, prompt.ids[end - lengths.step : end]))
        names.append(name)
    return names


@dataclass(frozen=True, slots=True)
class ChunksAhead:
    """How prompts are sent ahead to one backend."""

    engine: ComputesAhead
    chunk_tokens: int
    turns: Turns
    sent: Sent

    def takes(self, call: Call) -> bool:
        """Whether a request's prompt is long enough, by what is known of it before it is tokenized."""
        request = call.request
        return request.prompt_tokens - request.cached_tokens > self.chunk_tokens


def chunks_ahead(settings: BackendSettings, adapter: Adapter, capabilities: Capabilities) -> ChunksAhead | None:
    """How prompts are sent ahead to an engine that was probed; None where they are not.

    Raises BackendUnusable where they cannot be though the settings say so, with what helps.
    """
    if settings.chunks_outside_tokens is None:
        return None
    block_tokens = settings.limits.block_tokens or capabilities.block_tokens
    if not isinstance(adapter, ComputesAhead):
        why = f"is for vLLM, and this is {capabilities.engine}: leave it out"
    elif capabilities.prefix_caching is Support.NO:
        why = "needs the prefix cache, which is off: start vLLM with --enable-prefix-caching, or leave it out"
    elif capabilities.engines is not None and capabilities.engines > 1:
        why = (
            f"needs one cache, and {capabilities.engines} data-parallel engines have one each: make each a "
            "backend, or leave it out"
        )
    elif block_tokens is None:
        why = "needs the size of a cache block, which the engine does not tell: give limits.block_tokens"
    else:
        chunk = whole_blocks(settings.chunks_outside_tokens, block_tokens)
        return ChunksAhead(adapter, chunk, Turns(), Sent(capabilities.kv_tokens, chunk))
    raise BackendUnusable(f"chunks_outside_tokens {why}")


async def open_in_chunks(
    relay: Relay, ticket: Ticket, call: Call, out: Outgoing, chunks: ChunksAhead, clock: Callable[[], float]
) -> Opened:
    """`Relay.open` behind the chunks of its prompt; all together within the time that an answer's head has.

    Raises what that raises. Cancelled, it closes what is under way.
    """
    until_s = clock() + relay.head_s
    due_ms = math.inf if out.due_ms is None else out.due_ms
    try:
        async with asyncio.timeout(relay.head_s):
            sent = await _send_ahead(ticket, call, out, chunks, due_ms)
            # A whole answer would keep the others from their turns until its last token.
            takes_turn = sent and call.request.streamed
            if takes_turn:
                await chunks.turns.take(due_ms)
    except TimeoutError as error:
        raise UpstreamError(Failure.TIMEOUT, f"its prompt was not computed within {relay.head_s} s") from error
    try:
        return await relay.open(ticket, call, out, max(until_s - clock(), _LEAST_LEFT_S))
    finally:
        if takes_turn:
            chunks.turns.give_back()


async def _send_ahead(ticket: Ticket, call: Call, out: Outgoing, chunks: ChunksAhead, due_ms: float) -> bool:
    """Whether all of the prompt but its last chunk was computed ahead."""
    like = OutgoingRequest(
        call.route.path,
        out.headers,
        b"",
        out.request_id,
        streamed=False,
        left_ms=out.left_ms,
        due_ms=out.due_ms,
    )
    try:
        prompt = await chunks.engine.prompt_ids(call.route.path, call.body)
        lengths = prefix_lengths(len(prompt.ids), chunks.chunk_tokens)
        names = names_of(prompt, lengths)
        known = chunks.sent.longest(names)
        if lengths:
            # What is left of its prompt tells nothing of how long all of it takes.
            ticket.alone_at = None
        for tokens, name in zip(lengths[known:], names[known:], strict=True):
            await chunks.turns.take(due_ms)
            try:
                await chunks.engine.compute_ahead(prompt, tokens, like)
                chunks.sent.add(name)
            finally:
                chunks.turns.give_back()
    except (Unsupported, UpstreamError) as error:
        log.debug("request %s goes without chunks (any more): %s", out.request_id, error)
        return False
    return len(lengths) > 0
