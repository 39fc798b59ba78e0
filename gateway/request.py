"""From a client's bytes to a frozen request: read once, checked, with every mistake named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import orjson

from gateway.asked import Caller, asked_slo
from gateway.errors import InvalidRequest, NotFound
from gateway.fields import boolean, positive_int
from gateway.prompt import read_prompt
from gateway.routes import Route
from gateway.sse import Api
from gateway.tokens import TokenCounter
from gateway.words import kind, quoted, unknown
from scheduling.requests import Request
from scheduling.tiers import Slo, TierSet, classify

_MAX_SEQUENCES = 1_024
_MAX_TOKENS = 1 << 31


class Models(Protocol):
    """What the parser needs to know of the fleet."""

    def serves(self, model: str) -> bool: ...

    def names(self) -> list[str]: ...

    def max_model_tokens(self, model: str) -> int | None:
        """The longest prompt plus answer that any backend takes; None when it is not known."""
        ...

    async def count_tokens(self, model: str, fields: Mapping[str, object]) -> int | None:
        """Exact prompt tokens by an engine; None when none can tell."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request: what the core sees, and what the relay needs beside it."""

    request: Request
    route: Route
    body: bytes
    usage_asked: bool
    prompt_chars: int


class RequestParser:
    """Checks bodies and headers against the tiers and models of the moment."""

    def __init__(self, counter: TokenCounter, models: Models) -> None:
        self._counter = counter
        self._models = models

    async def parse(
        self,
        route: Route,
        body: bytes,
        headers: Mapping[str, str],
        *,
        caller: Caller,
        tiers: Callable[[], TierSet],
        request_id: str,
        arrival_s: float,
    ) -> Call:
        """A checked request. Raises InvalidRequest, naming the field, or NotFound for an unknown model."""
        fields = decode(body)
        if route.api is Api.GENERATE:
            fields = _own_fields(fields, route)
        model = self._model(fields, route)
        streamed = boolean(fields, "stream")
        embeds = route.api is Api.EMBEDDINGS
        if embeds and streamed:
            raise InvalidRequest("stream: embeddings cannot be streamed", param="stream")
        prompt = read_prompt(fields, route)
        limit = _token_limit(fields, route)
        longest = self._models.max_model_tokens(model)
        if limit is not None and longest is not None and limit > longest:
            raise InvalidRequest(
                f"{limit_name(fields, route)} is {limit}, but {model} takes at most {longest} tokens in all",
                param=limit_name(fields, route),
            )
        sequences = _sequences(fields, route) * prompt.prompts
        if sequences > _MAX_SEQUENCES:
            raise InvalidRequest(
                f"n times the number of prompts is {sequences}; at most {_MAX_SEQUENCES} are taken", param="n"
            )
        prompt_tokens = None
        if self._counter.asks_engine and not self._counter.exact(model) and prompt.prompts == 1:
            prompt_tokens = await self._models.count_tokens(model, fields)
        if prompt_tokens is None:
            prompt_tokens = await prompt.tokens(model, self._counter)
        # Counting may wait for a thread; the tiers are those of the moment the request enters the core.
        now = tiers()
        asked, stated = asked_slo(fields, headers, caller, now)
        granted = classify(asked, now)
        request = Request(
            request_id=request_id,
            model=model,
            tier=granted.tier.name,
            slo=Slo(granted.slo.ttft_s, None) if embeds else granted.slo,
            prompt_tokens=prompt_tokens,
            arrival_s=arrival_s,
            max_output_tokens=1 if embeds else limit,
            expected_output_tokens=1 if embeds else _length_hint(fields),
            sequences=sequences,
            slo_stated=stated,
            streamed=streamed,
            tenant=caller.tenant,
            session=headers.get("x-session-id"),
        )
        return Call(request, route, body, _usage_asked(fields), prompt.chars)

    def _model(self, fields: Mapping[str, object], route: Route) -> str:
        model = fields.get("model")
        if model is None and route.api is Api.GENERATE and len(self._models.names()) == 1:
            (model,) = self._models.names()
        if not isinstance(model, str) or not model:
            raise InvalidRequest("model: a model name is needed", param="model", code="missing_model")
        if not self._models.serves(model):
            raise NotFound(
                f"The model {quoted(model)} does not exist here: {unknown('model', model, self._models.names())}",
                param="model",
                code="model_not_found",
            )
        return model


def decode(body: bytes) -> dict[str, object]:
    """The body's fields. Raises InvalidRequest."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {kind(fields)}", code="invalid_json")
    return fields


def _own_fields(fields: Mapping[str, object], route: Route) -> dict[str, object]:
    """TGI's own body with its parameters beside the rest. Raises InvalidRequest."""
    parameters = fields.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters: must be an object, not {kind(parameters)}", param="parameters")
    return {**(parameters or {}), **fields, "stream": route.streams}


def limit_name(fields: Mapping[str, object], route: Route) -> str:
    """The token limit's field that is in use."""
    for name in route.limit_fields:
        if fields.get(name) is not None:
            return name
    return route.limit_fields[0]


def _token_limit(fields: Mapping[str, object], route: Route) -> int | None:
    if not route.limit_fields:
        return None
    name = limit_name(fields, route)
    return positive_int(fields.get(name), name, _MAX_TOKENS)


def _sequences(fields: Mapping[str, object], route: Route) -> int:
    if route.api is Api.GENERATE:
        return positive_int(fields.get("best_of"), "best_of", _MAX_SEQUENCES) or 1
    if route.api not in {Api.CHAT, Api.COMPLETIONS}:
        return 1
    n = positive_int(fields.get("n"), "n", _MAX_SEQUENCES) or 1
    if route.api is Api.COMPLETIONS:
        best_of = positive_int(fields.get("best_of"), "best_of", _MAX_SEQUENCES) or 1
        return max(n, best_of)
    return n


def _length_hint(fields: Mapping[str, object]) -> int | None:
    nvext = fields.get("nvext")
    hints = nvext.get("agent_hints") if isinstance(nvext, dict) else None
    if not isinstance(hints, dict):
        return None
    return positive_int(hints.get("osl"), "nvext.agent_hints.osl", _MAX_TOKENS)


def _usage_asked(fields: Mapping[str, object]) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest(f"stream_options: must be an object, not {kind(options)}", param="stream_options")
    return bool(options.get("include_usage"))
