"""From a client's bytes to a frozen request: read once, checked, with every mistake named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import orjson

from gateway.config import unknown
from gateway.errors import Dialect, InvalidRequest, NotFound
from gateway.sse import Api
from gateway.tokens import PromptText, TokenCounter
from scheduling.requests import Request
from scheduling.tiers import AskedSlo, Slo, TierSet, classify

_MAX_SLO_MS = 3_600_000.0
_MAX_SEQUENCES = 1_024
_MAX_TOKENS = 1 << 31
_TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
_TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
_SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast", "ultrafast", "standard_only")


@dataclass(frozen=True, slots=True)
class Route:
    """One generating endpoint. `prompt_field` is where its prompt stands, `limit_fields` its token limits."""

    path: str
    api: Api
    dialect: Dialect
    prompt_field: str
    limit_fields: tuple[str, ...]


ROUTES = (
    Route("/v1/chat/completions", Api.CHAT, Dialect.OPENAI, "messages", ("max_completion_tokens", "max_tokens")),
    Route("/v1/completions", Api.COMPLETIONS, Dialect.OPENAI, "prompt", ("max_tokens",)),
    Route("/v1/responses", Api.RESPONSES, Dialect.RESPONSES, "input", ("max_output_tokens",)),
    Route("/v1/messages", Api.MESSAGES, Dialect.ANTHROPIC, "messages", ("max_tokens",)),
    Route("/v1/embeddings", Api.EMBEDDINGS, Dialect.OPENAI, "input", ()),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and what its key allows."""

    tenant: str = ""
    tier: str | None = None
    tightest_tier: str | None = None


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
        model = self._model(fields)
        streamed = _boolean(fields, "stream")
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

    def _model(self, fields: Mapping[str, object]) -> str:
        model = fields.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("model: a model name is needed", param="model", code="missing_model")
        if not self._models.serves(model):
            raise NotFound(
                f"The model {model!r} does not exist here: {unknown('model', model, self._models.names())}",
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
        raise InvalidRequest(f"The body must be a JSON object, not {_kind(fields)}", code="invalid_json")
    return fields


def read_prompt(fields: Mapping[str, object], route: Route) -> PromptText:
    """The prompt's texts and sizes. Raises InvalidRequest."""
    text = PromptText()
    name = route.prompt_field
    prompt = fields.get(name)
    if prompt is None:
        raise InvalidRequest(f"{name}: this field is needed", param=name)
    if route.api in {Api.CHAT, Api.MESSAGES}:
        if not isinstance(prompt, list) or not prompt:
            raise InvalidRequest(
                f"messages: must be a list with at least one message, not {_kind(prompt)}", param=name
            )
        _add_messages(text, prompt)
    elif route.api is Api.RESPONSES and isinstance(prompt, list):
        _add_items(text, prompt)
    else:
        _add_prompts(text, prompt, name)
    for extra in ("system", "instructions"):
        value = fields.get(extra)
        if isinstance(value, str):
            text.add_text(value)
        elif isinstance(value, list):
            _add_parts(text, value)
    tools = fields.get("tools")
    if isinstance(tools, list) and tools:
        text.add_text(orjson.dumps(tools).decode())
    return text


def _add_messages(text: PromptText, messages: list[object]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]: must be an object, not {_kind(message)}", param="messages")
        content = message.get("content")
        if isinstance(content, str):
            text.add_text(content)
        elif isinstance(content, list):
            _add_parts(text, content)
        elif content is not None:
            raise InvalidRequest(
                f"messages[{index}].content: must be a text or a list of parts, not {_kind(content)}",
                param="messages",
            )
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            text.add_text(orjson.dumps(calls).decode())
        text.add_message()


def _add_parts(text: PromptText, parts: list[object]) -> None:
    for part in parts:
        if isinstance(part, str):
            text.add_text(part)
        elif isinstance(part, dict):
            inner = part.get("text", part.get("thinking", part.get("content")))
            if isinstance(inner, str):
                text.add_text(inner)
            elif isinstance(inner, list):
                _add_parts(text, inner)
            elif "image" in str(part.get("type")):
                text.add_image()


def _add_items(text: PromptText, items: list[object]) -> None:
    for item in items:
        if isinstance(item, dict):
            content = item.get("content", item.get("output", item.get("arguments")))
            if isinstance(content, str):
                text.add_text(content)
            elif isinstance(content, list):
                _add_parts(text, content)
            text.add_message()
        else:
            raise InvalidRequest(f"input: its items must be objects, not {_kind(item)}", param="input")


def _add_prompts(text: PromptText, prompt: object, name: str) -> None:
    if isinstance(prompt, str):
        text.add_text(prompt)
        return
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(
            f"{name}: must be a text, a list of texts or token ids, not {_kind(prompt)}", param=name
        )
    if all(type(item) is int for item in prompt):
        text.add_ids(len(prompt))
        return
    text.prompts = len(prompt)
    for item in prompt:
        if isinstance(item, str):
            text.add_text(item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            text.add_ids(len(item))
        else:
            raise InvalidRequest(f"{name}: a list must hold texts or token ids, not {_kind(item)}", param=name)


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
    return _positive_int(fields.get(name), name, _MAX_TOKENS)


def _sequences(fields: Mapping[str, object], route: Route) -> int:
    if route.api not in {Api.CHAT, Api.COMPLETIONS}:
        return 1
    n = _positive_int(fields.get("n"), "n", _MAX_SEQUENCES) or 1
    if route.api is Api.COMPLETIONS:
        best_of = _positive_int(fields.get("best_of"), "best_of", _MAX_SEQUENCES) or 1
        return max(n, best_of)
    return n


def _length_hint(fields: Mapping[str, object]) -> int | None:
    nvext = fields.get("nvext")
    hints = nvext.get("agent_hints") if isinstance(nvext, dict) else None
    if not isinstance(hints, dict):
        return None
    return _positive_int(hints.get("osl"), "nvext.agent_hints.osl", _MAX_TOKENS)


def _usage_asked(fields: Mapping[str, object]) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest(f"stream_options: must be an object, not {_kind(options)}", param="stream_options")
    return bool(options.get("include_usage"))


def asked_slo(
    fields: Mapping[str, object], headers: Mapping[str, str], caller: Caller, tiers: TierSet
) -> tuple[AskedSlo, bool]:
    """What pace is asked for, and whether anybody asked: headers, then `service_tier`, then the key's tier.

    Clamped to the tightest tier the key may have. Raises InvalidRequest.
    """
    tier = headers.get("x-slo-tier")
    names = [known.name for known in tiers.tiers]
    if tier is not None and tier not in tiers:
        raise InvalidRequest(f"x-slo-tier: {unknown('tier', tier, names)}", param="x-slo-tier")
    ttft_s = _header_s(headers, _TTFT_HEADERS)
    tpot_s = _header_s(headers, _TPOT_HEADERS)
    stated = tier is not None or ttft_s is not None or tpot_s is not None
    wished = _service_tier(fields, tiers)
    if not stated:
        if wished is not None:
            tier, stated = wished, True
        elif caller.tier is not None and caller.tier in tiers:
            tier, stated = caller.tier, True
    asked = AskedSlo(tier, ttft_s, tpot_s)
    if caller.tightest_tier is not None and caller.tightest_tier in tiers:
        asked = _clamped(asked, tiers, caller.tightest_tier)
    return asked, stated


def _clamped(asked: AskedSlo, tiers: TierSet, tightest: str) -> AskedSlo:
    bound = tiers[tightest]
    tier, ttft_s, tpot_s = asked.tier, asked.ttft_s, asked.tpot_s
    if tpot_s is not None and bound.slo.tpot_s is not None:
        tpot_s = max(tpot_s, bound.slo.tpot_s)
    if ttft_s is not None and bound.slo.ttft_s is not None:
        ttft_s = max(ttft_s, bound.slo.ttft_s)
    if (tier is not None and tiers[tier].rank < bound.rank) or classify(asked, tiers).tier.rank < bound.rank:
        tier = tightest
    return AskedSlo(tier, ttft_s, tpot_s)


def _service_tier(fields: Mapping[str, object], tiers: TierSet) -> str | None:
    wish = fields.get("service_tier")
    if wish is None:
        return None
    if not isinstance(wish, str) or wish not in _SERVICE_TIERS:
        raise InvalidRequest(
            f"service_tier: must be one of {', '.join(_SERVICE_TIERS)}, not {wish!r}", param="service_tier"
        )
    if wish in {"priority", "fast", "ultrafast"}:
        return tiers.tightest.name
    if wish == "flex":
        best_effort = tiers.best_effort
        return tiers.tiers[-1].name if best_effort is None else best_effort.name
    return None


def _header_s(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        text = headers.get(name)
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            raise InvalidRequest(f"{name}: {text[:40]!r} is not a number of milliseconds", param=name) from None
        if not math.isfinite(value) or not 0 < value <= _MAX_SLO_MS:
            raise InvalidRequest(
                f"{name}: must be more than 0 and at most {_MAX_SLO_MS:.0f} milliseconds, not {text[:40]}",
                param=name,
            )
        return value / 1e3
    return None


def _boolean(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{name}: must be true or false, not {_kind(value)}", param=name)


def _positive_int(value: object, name: str, highest: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}: must be a whole number, not {_kind(value)}", param=name)
    if not 1 <= value <= highest:
        raise InvalidRequest(f"{name}: must be from 1 to {highest}, not {value}", param=name)
    return value


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "an empty list" if not value else "a list"
        case _:
            return "an object"
