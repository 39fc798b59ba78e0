"""Where the tokens of one request go: a stream that writes them as they come, or a count for a whole answer.

A stream costs one transport write a token. When the client does not read, the transport says so, and tokens are
only counted until it reads again; they then go out as one event, as vLLM merges what a slow client has not taken.
So memory does not depend on how slow a client is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp.base_protocol import BaseProtocol

from adapters.emulated.settings import Faults
from adapters.emulated.sse import EventWriter, Usage, chunk
from adapters.emulated.tokens import TOKEN_TEXT, WORD_MASK, answer_text


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One sequence of a request: its id in the engine, which prompt it answers, and what it will say."""

    sequence_id: str
    prompt_index: int
    prompt_tokens: int
    output_tokens: int
    first_word: int
    by_length: bool  # ends at the client's limit rather than by itself

    @property
    def finish_reason(self) -> str:
        return "length" if self.by_length else "stop"

    def text(self) -> str:
        return answer_text(self.first_word, 0, self.output_tokens)


class WholeAnswer:
    """Waits for all sequences of a request that is not streamed."""

    def __init__(self, sequences: int) -> None:
        self._left = sequences
        self._done = asyncio.get_running_loop().create_future()

    def token(self, _index: int, *, finished: bool) -> None:
        if finished:
            self._left -= 1
            if not self._left and not self._done.done():
                self._done.set_result(None)

    async def wait(self) -> None:
        """Until the last token of the last sequence."""
        await self._done


class Stream:
    """The open stream of one request: its connection, its choices, and what is said at the end."""

    def __init__(
        self,
        protocol: BaseProtocol,
        transport: asyncio.WriteTransport,
        writers: Sequence[EventWriter],
        plans: Sequence[ChoicePlan],
        *,
        usage: bool,
        running_usage: bool,
        faults: Faults,
    ) -> None:
        self.protocol = protocol
        self.transport = transport
        self.running_usage = running_usage
        self.fingerprint = not usage
        self.faults = faults
        self._usage = usage
        self._plans = plans
        self._writers = writers
        self._prompt_tokens = prompt_tokens(plans)
        self._opened = False
        self._left = len(plans)
        self._done = asyncio.get_running_loop().create_future()
        self.choices = tuple(ChoiceStream(self, writer, plan) for writer, plan in zip(writers, plans, strict=True))

    def open(self) -> bytes:
        """What precedes the first token of all: in a chat, the role of every choice."""
        if self._opened:
            return b""
        self._opened = True
        return b"".join(
            writer.opening(self._prompt_tokens, running_usage=self.running_usage) for writer in self._writers
        )

    def choice_ended(self) -> None:
        self._left -= 1
        if not self._left and not self._done.done():
            self._done.set_result(None)

    async def wait(self) -> bytes:
        """Until every choice has ended; returns the events still to be written."""
        await self._done
        events = [self.open(), *(choice.rest() for choice in self.choices)]
        usage = Usage(self._prompt_tokens, sum(plan.output_tokens for plan in self._plans))
        events.append(self._writers[0].closing(usage, self._plans[-1].finish_reason, usage_asked=self._usage))
        return b"".join(events)


class ChoiceStream:
    """Writes one choice's tokens. `token` is the hottest code of the server."""

    __slots__ = (
        "_first",
        "_heads",
        "_held",
        "_is_closing",
        "_plain",
        "_plan",
        "_protocol",
        "_stream",
        "_tail",
        "_write",
        "_writer",
    )

    def __init__(self, stream: Stream, writer: EventWriter, plan: ChoicePlan) -> None:
        self._stream = stream
        self._writer = writer
        self._plan = plan
        self._first = plan.first_word
        self._heads = writer.fast_heads
        self._tail = writer.fast_tail
        self._protocol = stream.protocol
        self._write = stream.transport.write
        self._is_closing = stream.transport.is_closing
        self._held: int | None = None  # the first token not yet written, while the client does not read
        faults = stream.faults
        faulty = faults.cut_after_tokens is not None or faults.stall_after_tokens is not None
        self._plain = not stream.running_usage and not faulty

    def token(self, index: int, *, finished: bool) -> None:
        """Write token `index`, or count it while the client does not read."""
        if self._is_closing():
            return  # the client has left; the handler, cancelled for that, aborts the sequence in a moment
        if index and self._plain and not finished and self._held is None and not self._protocol.writing_paused:
            text = TOKEN_TEXT[(self._first + index) & WORD_MASK]
            head = self._heads.get(len(text)) or self._writer.fast_head(len(text))
            self._write(head + text + self._tail)
        else:
            self._seldom(index, finished=finished)

    def rest(self) -> bytes:
        """The event for tokens that were held to the end, if any."""
        if self._held is None:
            return b""
        first, self._held = self._held, None
        return self._event(first, self._plan.output_tokens)

    def _seldom(self, index: int, *, finished: bool) -> None:
        stream = self._stream
        faults = stream.faults
        if faults.cut_after_tokens is not None and index >= faults.cut_after_tokens:
            stream.transport.abort()
            return
        if faults.stall_after_tokens is not None and index >= faults.stall_after_tokens:
            return  # the request stays open and silent until the client leaves
        if self._held is None:
            self._held = index
        if not self._protocol.writing_paused:
            first, self._held = self._held, None
            self._write(chunk(stream.open() + self._event(first, index + 1)))
        if finished:
            stream.choice_ended()

    def _event(self, first: int, end: int) -> bytes:
        stream, plan = self._stream, self._plan
        last = end == plan.output_tokens
        return self._writer.text(
            answer_text(self._first, first, end).encode(),
            plan.finish_reason if last else None,
            Usage(plan.prompt_tokens, end) if stream.running_usage else None,
            fingerprint=last and stream.fingerprint,
        )


def prompt_tokens(plans: Sequence[ChoicePlan]) -> int:
    """Prompt tokens of a request as usage counts them: every prompt once, however many choices it has."""
    return sum({plan.prompt_index: plan.prompt_tokens for plan in plans}.values())
