"""What the fake engines share: what a sequence will say, and where its tokens go. No model is inside."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

from aiohttp import web

from adapters.emulated.driver import EngineDriver
from adapters.emulated.tokens import TOKEN_TEXT, WORD_MASK

Json: TypeAlias = dict[str, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """One sequence: what it will say. The last token of one that ends by itself is `end_token`."""

    sequence_id: str
    prompt_tokens: int
    output_tokens: int
    first: int
    by_length: bool
    end_token: str

    def text(self, index: int) -> str:
        if self.ends(index) and not self.by_length:
            return self.end_token
        return TOKEN_TEXT[(self.first + index) & WORD_MASK].decode()

    def ends(self, index: int) -> bool:
        return index + 1 == self.output_tokens

    def usage(self) -> Json:
        total = self.prompt_tokens + self.output_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": total,
        }


class Sink:
    """Puts a sequence's tokens where its request waits for them."""

    def __init__(self, choice: int, into: asyncio.Queue[tuple[int, int]]) -> None:
        self._choice = choice
        self._into = into

    def token(self, index: int, *, finished: bool) -> None:
        self._into.put_nowait((self._choice, index))


def chat_words(body: Json) -> list[str]:
    """A word a token, and one for each role."""
    words: list[str] = []
    messages = body["messages"]
    assert isinstance(messages, list)
    for message in messages:
        words += [f"<|{message['role']}|>", *str(message["content"]).split()]
    return words


def unminted(body: bytes) -> bytes:
    """An answer's bytes with the ids that the TGI adapter filled in left empty again."""
    return re.sub(rb'"id":"(?:chatcmpl|cmpl)-[^"]+"', b'"id":""', body)


async def say_fake(_request: web.Request, response: web.StreamResponse) -> None:
    """Every answer of a fake says that it is emulated."""
    response.headers["x-tiergate-emulated"] = "1"


@contextlib.asynccontextmanager
async def served(app: web.Application, driver: EngineDriver) -> AsyncIterator[str]:
    """The application on a free port while its engine runs; its URL."""
    app.on_response_prepare.append(say_fake)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(driver.run())
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
            running.cancel()
