"""Any server that speaks OpenAI's API: what all engine families have in common, and nothing that one lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapters.contract import (
    Capabilities,
    EngineLoad,
    Failure,
    OutgoingRequest,
    Support,
    Unsupported,
    Upstream,
    UpstreamCall,
    UpstreamError,
)
from adapters.errors import error_in_event, failure_of_status, message_of, rejection
from adapters.exchange import Answer, ask
from adapters.models import ModelList
from adapters.usage import with_usage

# Headers that belong to one connection (RFC 9110 §7.6.1), or that the client library sets itself.
_NOT_FORWARDED = frozenset(
    {
        "accept-encoding",  # the engine's bytes must stay readable, so no compression is asked for
        "connection",
        "content-encoding",  # the body that is sent on was decompressed where it came in
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Elsewhere a stream carries usage by itself, and `stream_options` is unknown or means something else.
_USAGE_BY_OPTION = frozenset({"/v1/chat/completions", "/v1/completions"})
EMULATED_HEADER = "x-tiergate-emulated"


class OpenAIAdapter:
    """One OpenAI-compatible endpoint (`adapters.contract.Adapter`).

    It never sends a field or header that OpenAI's API does not have. Some such servers refuse even
    ``stream_options`` (`transformers serve`); `adds_usage` says whether it may be added.

    Attributes:
        family: what such a server is called.
        absent: generating routes that it has not. Some have one of TGI's names, and mean something else by it.
    """

    family: ClassVar[str] = "an OpenAI server"
    absent: ClassVar[frozenset[str]] = frozenset({"/generate", "/generate_stream"})

    def __init__(
        self,
        upstream: Upstream,
        *,
        api_key: str | None = None,
        adds_usage: bool = True,
        probe_timeout_s: float = 10.0,
    ) -> None:
        """`api_key` replaces the client's Authorization towards the engine; None leaves it as it came."""
        self._upstream = upstream
        self._api_key = api_key
        self._adds_usage = adds_usage
        self._probe_timeout_s = probe_timeout_s

    @property
    def upstream(self) -> Upstream:
        return self._upstream

    async def probe(self) -> Capabilities:
        """Ask for the models. An empty list or an error there is tolerated; no answer is an UpstreamError.

        Raises UpstreamError(REJECTED) when the engine wants another API key.
        """
        models = await self._ask_models()
        return Capabilities(
            engine="openai",
            emulated=models.emulated,
            models=models.names,
            max_model_tokens=models.max_model_tokens,
            priority=Support.NO,
            tokenize=Support.NO,
            load=Support.NO,
            # Nothing is known of how many tokens such a server puts into one event.
            tokens_per_event=None,
        )

    async def healthy(self) -> bool:
        """Whether the server answers at all; a gateway's 502-504 in front of it is no answer."""
        try:
            answer = await self._ask("GET", "/v1/models")
        except UpstreamError:
            return False
        return answer.status not in (502, 503, 504)

    async def read_load(self) -> EngineLoad:
        """Such a server reports nothing: every field is unknown."""
        return EngineLoad()

    def prepare(self, request: OutgoingRequest) -> UpstreamCall:
        """The exchange that carries the request; the body is changed only to add a usage event.

        Raises UpstreamError(UNSUPPORTED) for a generating route that such a server does not have.
        """
        if request.path in self.absent:
            raise UpstreamError(Failure.UNSUPPORTED, f"{self.family} has no {request.path}")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_FORWARDED}
        _set(headers, "x-request-id", request.request_id)
        if self._api_key is not None:
            _set(headers, "authorization", f"Bearer {self._api_key}")
        body = request.body
        if request.want_usage and request.streamed and self._adds_usage and request.path in _USAGE_BY_OPTION:
            body = with_usage(body)
        return UpstreamCall("POST", request.path, headers, body)

    def stream_failure(self, first_event: bytes) -> UpstreamError | None:
        """The error that a stream's first event carries, if it is one (an overload that came as 200)."""
        return error_in_event(first_event)

    def response_failure(self, status: int, body: bytes) -> UpstreamError:
        """What an answer with an error status means."""
        failure = failure_of_status(status)
        if status in (401, 403) and self._api_key is not None:
            # The key is this backend's own, so the client's request is not what is wrong.
            failure = Failure.BROKEN
        message = message_of(body) or f"the engine answered {status}"
        if failure is Failure.REJECTED:
            failure = rejection(message, status)
        return UpstreamError(failure, message, status)

    async def abort(self, request_id: str) -> None:
        """Not by id: disconnecting is what stops such a server."""
        raise Unsupported("abort by id")

    async def count_tokens(self, body: Mapping[str, object]) -> int:
        raise Unsupported("count tokens")

    async def set_chunk_budget(self, tokens: int | None) -> None:
        raise Unsupported("chunk budget")

    async def set_running_cap(self, sequences: int | None) -> None:
        raise Unsupported("running cap")

    async def close(self) -> None:
        await self._upstream.close()

    async def _ask_models(self) -> ModelList:
        answer = await self._ask("GET", "/v1/models")
        if answer.status in (401, 403):
            message = message_of(answer.body) or f"/v1/models answered {answer.status}"
            raise UpstreamError(Failure.REJECTED, message, answer.status)
        emulated = answer.headers.get(EMULATED_HEADER) == "1"
        return ModelList.read(answer.body if answer.status == 200 else b"", emulated)

    async def _ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One small exchange that is not a client's request. Raises UpstreamError."""
        return await ask(
            self._upstream, method, path, body=body, api_key=self._api_key, timeout_s=self._probe_timeout_s
        )


def _set(headers: dict[str, str], name: str, value: str) -> None:
    """Set a header, replacing it however the client spelled it. `name` is lower-case."""
    for given in [key for key in headers if key.lower() == name]:
        del headers[given]
    headers[name] = value
