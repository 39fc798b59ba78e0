"""A live engine as `profiles.measure` wants it: streamed completions over HTTP, with the time of each token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import orjson

from adapters.contract import Adapter, Failure, OutgoingRequest, UpstreamError
from profiles.measure import Completion, MeasureError

_PATH = "/v1/completions"
_FIRST_ID, _LAST_ID = 16, 250  # token ids that every vocabulary has and that are rarely special
_WORDS = ("river", "stone", "cloud", "lamp", "green", "seven", "north", "paper", "slow", "open", "glass", "wind")


class HttpConnection:
    """Sends `/v1/completions` through an adapter. One instance measures one model.

    Prompts are random token ids, so that no prefix is cached and their length is exact. A server that refuses ids,
    or the options that keep answers going (`ignore_eos`), is asked again without, once and for all; words then
    stand for tokens, and `usage` says how many there were.
    """

    def __init__(self, adapter: Adapter, model: str, seed: int) -> None:
        self._adapter = adapter
        self._model = model
        self._random = random.Random(seed)
        self._plain = False
        self._tokens_per_word = 1.0
        self._count = 0

    def now_s(self) -> float:
        return time.perf_counter()

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        """Stream one completion. Raises MeasureError when the engine refuses it or breaks off."""
        try:
            return await self._complete(prompt_tokens, output_tokens)
        except UpstreamError as error:
            if error.failure is Failure.REJECTED and not self._plain:
                self._plain = True
                try:
                    return await self._complete(prompt_tokens, output_tokens)
                except UpstreamError as again:
                    error = again
            raise MeasureError(
                f"a completion of {prompt_tokens} prompt and {output_tokens} output tokens failed: {error}"
            ) from error

    def _body(self, prompt_tokens: int, output_tokens: int) -> bytes:
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": 1.0,
            "stream": True,
        }
        if self._plain:
            words = max(round(prompt_tokens / self._tokens_per_word), 1)
            body["prompt"] = " ".join(self._random.choices(_WORDS, k=words))
        else:
            body["prompt"] = self._random.choices(range(_FIRST_ID, _LAST_ID), k=prompt_tokens)
            body["ignore_eos"] = True
            # vLLM puts tokens that it could not send in time into one event: only a running count tells
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return orjson.dumps(body)

    async def _complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        self._count += 1
        call = self._adapter.prepare(
            OutgoingRequest(
                path=_PATH,
                headers={"content-type": "application/json", "accept": "text/event-stream"},
                body=self._body(prompt_tokens, output_tokens),
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
        if events.prompt_tokens is not None and self._plain:
            self._tokens_per_word *= max(events.prompt_tokens, 1) / prompt_tokens
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
        if parsed.get("choices"):
            came = counted - len(self._times) if isinstance(counted, int) else 1
            before_s = self._times[-1] if self._times else now_s
            self._times += [before_s + (now_s - before_s) * part / came for part in range(1, came + 1)]
