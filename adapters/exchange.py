"""Small questions to an engine (models, metrics, health): one answer, whole, within a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from adapters.contract import Failure, Upstream, UpstreamCall, UpstreamError

ANSWER_LIMIT_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `status` is 0 when there was none."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json_object(self) -> Mapping[str, object]:
        """The body as a JSON object; empty when it is none."""
        try:
            parsed = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return {}
        return parsed if isinstance(parsed, dict) else {}


NO_ANSWER = Answer(0)


async def ask(
    upstream: Upstream, method: str, path: str, *, body: bytes = b"", api_key: str | None, timeout_s: float
) -> Answer:
    """One exchange, body included, within `timeout_s`. Raises UpstreamError."""
    headers = {"accept": "*/*"}
    if body:
        headers["content-type"] = "application/json"
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    try:
        async with asyncio.timeout(timeout_s):
            response = await upstream.open(UpstreamCall(method, path, headers, body))
            try:
                return Answer(response.status, response.headers, await response.read_all(ANSWER_LIMIT_BYTES))
            finally:
                response.release()
    except TimeoutError as error:
        raise UpstreamError(Failure.TIMEOUT, f"{method} {path} was not answered within {timeout_s} s") from error
