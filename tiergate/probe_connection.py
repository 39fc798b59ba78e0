"""A live engine as `profiles.measure` wants it: streamed completions over HTTP, with the time of each token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from enum import Enum

import orjson

from adapters.contract import Adapter, Failure, OutgoingRequest, UpstreamError
from profiles.measure import Completion, MeasureError

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_FIRST_ID, _LAST_ID = 16, 250  # token ids that every vocabulary has and that are rarely special
_TELLING_TOKENS = 64  # shorter prompts are mostly a chat template
_WORDS = ("river", "stone", "cloud", "lamp", "green", "seven", "north", "paper", "slow", "open", "glass", "wind")


class _Way(Enum):
    """How a prompt is put."""

    IDS = "ids"
    WORDS = "words"
    CHAT = "chat"


class HttpConnection:
    """Streams completions through an adapter. One instance measures one model.

    Prompts are random token ids to `/v1/completions`, so that no prefix is cached and their length is exact. A
    server that refuses ids, or the option that keeps answers going (`ignore_eos`), is asked again with words that
    stand for tokens, and one that refuses those too by `/v1/chat/completions`; `usage` says how many tokens there
    were. What was refused once is not tried again.
    """

    def __init__(self, adapter: Adapter, model: str, seed: int) -> None:
        self._adapter = adapter
        self._model = model
        self._random = random.Random(seed)
        self._ways = [_Way.IDS, _Way.WORDS, _Way.CHAT]
        self._tokens_per_word = 1.0
        self._count = 0

    def now_s(self) -> float:
        return time.perf_counter()

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        """Stream one completion. Raises MeasureError when the engine refuses it or breaks off."""
        while True:
            way = self._ways[0]
            try:
                return await self._complete(way, prompt_tokens, output_tokens)
            except UpstreamError as error:
                if error.failure is Failure.REJECTED and way is not self._ways[-1]:
                    # Streams that were refused together drop their way once.
                    if self._ways[0] is way:
                        self._ways.pop(0)
                    continue
                raise MeasureError(
                    f"a completion of {prompt_tokens} prompt and {output_tokens} output tokens failed: {error}"
                ) from error

    def _body(self, way: _Way, prompt_tokens: int, output_tokens: int) -> bytes:
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": 1.0,
            "stream": True,
        }
        if way is _Way.IDS:
            body["prompt"] = self._random.choices(range(_FIRST_ID, _LAST_ID), k=prompt_tokens)
            body["ignore_eos"] = True
            # vLLM puts tokens that it could not send in time into one event: only a running count tells
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            return orjson.dumps(body)
        text = " ".join(self._random.choices(_WORDS, k=max(round(prompt_tokens / self._tokens_per_word), 1)))
        body |= {"prompt": text} if way is _Way.WORDS else {"messages": [{"role": "user", "content": text}]}
        return orjson.dumps(body)

    async def _complete(self, way: _Way, prompt_tokens: int, output_tokens: int) -> Completion:
        self._count += 1
        tokens_per_word = self._tokens_per_word
        call = self._adapter.prepare(
            OutgoingRequest(
                path=_CHAT if way is _Way.CHAT else _COMPLETIONS,
                headers={"content-type": "application/json", "accept": "text/event-stream"},
                body=self._body(way, prompt_tokens, output_tokens),
                request_id=f"profile-{self._count}",
                streamed=True,
                want_usage=True,
            )
        )
        sent_s = self.now_s()
        response = await self._adapter.upstream.open(call)
        try:
            if response.status != 200:
                raise self._adapter.response_failure(response.status, await response.read_all(1 << 20))
            events = _Events(self._adapter)
            while block := await response.read():
                events.feed(block, self.now_s())
            response.release()
        finally:
            response.abort()
        if events.prompt_tokens is not None and way is not _Way.IDS and prompt_tokens >= _TELLING_TOKENS:
            words = max(round(prompt_tokens / tokens_per_word), 1)
            self._tokens_per_word = max(events.prompt_tokens, 1) / words
        return Completion(sent_s, events.token_times(), events.prompt_tokens or prompt_tokens)


class _Events:
    """The events of one stream: when each token came, and what usage says."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._rest = b""
        self._times: list[float] = []
        self._checked = False
        self._output_tokens: int | None = None
        self.prompt_tokens: int | None = None

    def feed(self, block: bytes, now_s: float) -> None:
        for event in self._split(block):
            if not self._checked:
                self._checked = True
                failure = self._adapter.stream_failure(event)
                if failure is not None:
                    raise failure
            self._read(event, now_s)

    def token_times(self) -> tuple[float, ...]:
        """One time per token. An event more than there were tokens is the one that only ends the stream.

        Tokens that came in one event are spread evenly over the time since the event before.
        """
        if self._output_tokens is not None and len(self._times) == self._output_tokens + 1:
            return tuple(self._times[:-1])
        if self._output_tokens is not None and len(self._times) < 0.9 * self._output_tokens:
            raise MeasureError(
                f"{self._output_tokens} tokens came in {len(self._times)} events: an engine that puts several "
                "tokens into one event cannot be measured from outside"
            )
        return tuple(self._times)

    def _split(self, block: bytes) -> Iterator[bytes]:
        *events, self._rest = (self._rest + block.replace(b"\r\n", b"\n")).split(b"\n\n")
        return (event for event in events if event.strip())

    def _read(self, event: bytes, now_s: float) -> None:
        for line in event.split(b"\n"):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                continue
            try:
                parsed = orjson.loads(data)
            except orjson.JSONDecodeError as error:
                raise UpstreamError(Failure.BROKEN, "an event of the stream is not JSON") from error
            self._take(parsed, now_s)

    def _take(self, parsed: object, now_s: float) -> None:
        if not isinstance(parsed, dict):
            return
        counted = None
        usage = parsed.get("usage")
        if isinstance(usage, dict):
            prompt, counted = usage.get("prompt_tokens"), usage.get("completion_tokens")
            self.prompt_tokens = prompt if isinstance(prompt, int) else self.prompt_tokens
            self._output_tokens = counted if isinstance(counted, int) else self._output_tokens
        choices = parsed.get("choices")
        if isinstance(choices, list) and choices and not _opens_only(choices[0]):
            came = counted - len(self._times) if isinstance(counted, int) else 1
            before_s = self._times[-1] if self._times else now_s
            self._times += [before_s + (now_s - before_s) * part / came for part in range(1, came + 1)]


def _opens_only(choice: object) -> bool:
    """Whether a chat event only says who speaks: no token made it."""
    delta = choice.get("delta") if isinstance(choice, dict) else None
    if not isinstance(delta, dict) or "role" not in delta:
        return False
    return not any(value for key, value in delta.items() if key != "role")
