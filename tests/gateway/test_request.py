"""Bad input: every mistake is a 4xx that names its field; good input becomes the right request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from gateway.asked import Caller
from gateway.config import Settings, TokenSettings, tier_set
from gateway.errors import ApiError
from gateway.request import Call, RequestParser
from gateway.routes import ROUTES
from gateway.tokens import TokenCounter

_TIERS = tier_set(Settings())
_CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class _Models:
    def serves(self, model: str) -> bool:
        return model == "m"

    def names(self) -> list[str]:
        return ["m"]

    def max_model_tokens(self, model: str) -> int | None:
        return 8192

    async def count_tokens(self, model: str, fields: Mapping[str, object]) -> int | None:
        return 321


def _nested(depth: int) -> orjson.Fragment:
    """A list in a list, `depth` times: deeper than orjson writes."""
    return orjson.Fragment(b"[" * depth + b"1" + b"]" * depth)


async def _parse(
    body: object,
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
    caller: Caller | None = None,
) -> Call:
    counter = TokenCounter(TokenSettings(), {})
    route = next(route for route in ROUTES if route.path == path)
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return await RequestParser(counter, _Models()).parse(
        route, raw, headers or {}, caller=caller or Caller(), tiers=lambda: _TIERS, request_id="r", arrival_s=1.0
    )


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"null", 400, None),
        (b"[]", 400, None),
        (b'"text"', 400, None),
        ({}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"model": ""}, 400, "model"),
        ({"model": "other", "messages": [{}]}, 404, "model"),
        ({"model": "m"}, 400, "messages"),
        (_CHAT | {"messages": []}, 400, "messages"),
        (_CHAT | {"messages": "hi"}, 400, "messages"),
        (_CHAT | {"messages": [3]}, 400, "messages"),
        (_CHAT | {"messages": [{"role": "user", "content": 3}]}, 400, "messages"),
        (_CHAT | {"stream": "yes"}, 400, "stream"),
        (_CHAT | {"stream": 1}, 400, "stream"),
        (_CHAT | {"stream_options": 1}, 400, "stream_options"),
        (_CHAT | {"max_tokens": "9"}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": 0}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": -1}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": 1.5}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": True}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": 10**12}, 400, "max_tokens"),
        (_CHAT | {"max_tokens": 9000}, 400, "max_tokens"),
        (_CHAT | {"max_completion_tokens": 9000}, 400, "max_completion_tokens"),
        (_CHAT | {"n": 0}, 400, "n"),
        (_CHAT | {"n": "2"}, 400, "n"),
        (_CHAT | {"n": 10**6}, 400, "n"),
        (_CHAT | {"service_tier": "gold"}, 400, "service_tier"),
        (_CHAT | {"service_tier": 3}, 400, "service_tier"),
        (_CHAT | {"service_tier": _nested(1000)}, 400, "service_tier"),
        (_CHAT | {"tools": _nested(400)}, 400, "tools"),
        (_CHAT | {"messages": [{"role": "assistant", "tool_calls": _nested(400)}]}, 400, "messages"),
        (_CHAT | {"nvext": {"agent_hints": {"osl": -3}}}, 400, "nvext.agent_hints.osl"),
        (_CHAT | {"nvext": {"agent_hints": {"osl": "many"}}}, 400, "nvext.agent_hints.osl"),
    ],
)
async def test_a_bad_body_is_told_by_field(body: object, status: int, param: str | None) -> None:
    with pytest.raises(ApiError) as raised:
        await _parse(body)
    error = orjson.loads(raised.value.body())["error"]
    assert (raised.value.status, error["param"]) == (status, param)
    assert error["message"]
    if param is not None and status == 400:
        assert param.rsplit(".", 1)[-1] in error["message"]


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
@pytest.mark.parametrize(
    "value", ["", "fast", "nan", "inf", "-inf", "-5", "0", "1e300", "1e999", "3600001", "0x10"]
)
async def test_a_bad_slo_header_is_told_by_name(name: str, value: str) -> None:
    with pytest.raises(ApiError) as raised:
        await _parse(_CHAT, {name: value})
    assert (raised.value.status, raised.value.param) == (400, name)


async def test_a_bad_alias_is_told_though_the_other_name_wins() -> None:
    with pytest.raises(ApiError) as raised:
        await _parse(_CHAT, {"x-slo-ttft-ms": "500", "x-llm-d-slo-ttft-ms": "soon"})
    assert (raised.value.status, raised.value.param) == (400, "x-llm-d-slo-ttft-ms")


async def test_a_number_that_is_not_whole_is_told_as_it_is() -> None:
    with pytest.raises(ApiError, match=r"must be a whole number, not 1\.5"):
        await _parse(_CHAT | {"max_tokens": 1.5})


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"model": "ab" * 500_000}, {}),
        ({"service_tier": "ab" * 500_000}, {}),
        ({}, {"x-slo-tier": "ab" * 500_000}),
        ({}, {"x-slo-ttft-ms": "9" * 500_000}),
        ({}, {"x-slo-ttft-ms": "nine" * 500_000}),
    ],
)
async def test_a_long_value_is_cut_in_the_message(body: dict[str, object], headers: dict[str, str]) -> None:
    with pytest.raises(ApiError) as raised:
        await _parse(_CHAT | body, headers)
    assert len(raised.value.body()) < 1_000


async def test_an_unknown_tier_is_told_with_the_nearest() -> None:
    with pytest.raises(ApiError, match="did you mean 'batch'") as raised:
        await _parse(_CHAT, {"x-slo-tier": "bach"})
    assert (raised.value.status, raised.value.param) == (400, "x-slo-tier")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "m"}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": []}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": ["a", 3.5]}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": "a", "best_of": 0}, "best_of"),
        ("/v1/completions", {"model": "m", "prompt": ["a"] * 100, "n": 100}, "n"),
        ("/v1/responses", {"model": "m"}, "input"),
        ("/v1/responses", {"model": "m", "input": [3]}, "input"),
        ("/v1/messages", {"model": "m", "messages": {}}, "messages"),
        ("/v1/embeddings", {"model": "m", "input": "a", "stream": True}, "stream"),
    ],
)
async def test_other_routes_name_their_fields(path: str, body: object, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        await _parse(body, path=path)
    assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize(
    ("headers", "body", "caller", "tier", "stated"),
    [
        ({}, {}, Caller(), "chat", False),
        ({"x-slo-tier": "fast"}, {}, Caller(), "fast", True),
        ({"x-slo-tpot-ms": "70"}, {}, Caller(), "chat", True),
        ({"x-llm-d-slo-tpot-ms": "20"}, {}, Caller(), "fast", True),
        ({"x-slo-tpot-ms": "100", "x-llm-d-slo-tpot-ms": "20"}, {}, Caller(), "summary", True),
        ({}, {"service_tier": "priority"}, Caller(), "fast", True),
        ({}, {"service_tier": "flex"}, Caller(), "batch", True),
        ({}, {"service_tier": "auto"}, Caller(), "chat", False),
        ({}, {"service_tier": "auto"}, Caller("t", tier="summary"), "summary", True),
        ({"x-slo-tier": "summary"}, {"service_tier": "fast"}, Caller(), "summary", True),
        ({"x-slo-tier": "fast"}, {}, Caller("t", tightest_tier="chat"), "chat", True),
        ({"x-slo-tpot-ms": "5"}, {}, Caller("t", tightest_tier="chat"), "chat", True),
        ({}, {"service_tier": "fast"}, Caller("t", tightest_tier="summary"), "summary", True),
        ({}, {}, Caller("t", tightest_tier="summary"), "summary", False),
    ],
)
async def test_the_pace_first_found_wins(
    headers: dict[str, str], body: dict[str, object], caller: Caller, tier: str, stated: bool
) -> None:
    request = (await _parse(_CHAT | body, headers, caller=caller)).request
    assert (request.tier, request.slo_stated) == (tier, stated)
    if caller.tightest_tier is not None:
        bound = _TIERS[caller.tightest_tier].slo.tpot_s
        assert request.slo.tpot_s is not None
        assert bound is not None
        assert request.slo.tpot_s >= bound


async def test_own_times_replace_the_tiers() -> None:
    request = (await _parse(_CHAT, {"x-slo-ttft-ms": "1500", "x-slo-tpot-ms": "60.5"})).request
    assert (request.slo.ttft_s, request.slo.tpot_s) == (1.5, 0.0605)


async def test_what_a_request_costs() -> None:
    ids = {"model": "m", "prompt": [[1] * 10, [2] * 30], "n": 2, "best_of": 3, "max_tokens": 5}
    request = (await _parse(ids, path="/v1/completions")).request
    assert (request.sequences, request.prompt_tokens, request.max_output_tokens) == (6, 20, 5)
    hinted = (await _parse(_CHAT | {"nvext": {"agent_hints": {"osl": 77}}, "stream": True})).request
    assert (hinted.expected_output_tokens, hinted.streamed) == (77, True)
    image = [{"type": "image_url", "image_url": {"url": "data:..."}}, {"type": "text", "text": "what"}]
    shown = (await _parse(_CHAT | {"messages": [{"role": "user", "content": image}]})).request
    assert shown.prompt_tokens > 500
    embedding = (await _parse({"model": "m", "input": ["a", "b"]}, path="/v1/embeddings")).request
    assert embedding.slo.tpot_s is None
    assert (embedding.sequences, embedding.max_output_tokens) == (2, 1)
    anthropic = {"model": "m", "messages": _CHAT["messages"], "system": [{"type": "text", "text": "x" * 400}]}
    assert (await _parse(anthropic, path="/v1/messages")).request.prompt_tokens >= 100


async def test_the_engine_is_asked_for_the_count_only_when_told_to() -> None:
    for asks, tokens in ((True, 321), (False, 5)):
        counter = TokenCounter(TokenSettings(engine=asks), {})
        call = await RequestParser(counter, _Models()).parse(
            ROUTES[0],
            orjson.dumps(_CHAT),
            {},
            caller=Caller(),
            tiers=lambda: _TIERS,
            request_id="r",
            arrival_s=1.0,
        )
        assert call.request.prompt_tokens == tokens


async def test_tgis_own_body_needs_a_model_only_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"inputs": "a b", "parameters": {"max_new_tokens": 7, "best_of": 2}}
    for path, streamed in (("/generate", False), ("/generate_stream", True)):
        request = (await _parse(body, path=path)).request
        assert (request.model, request.max_output_tokens, request.sequences) == ("m", 7, 2)
        assert request.streamed is streamed
    monkeypatch.setattr(_Models, "names", lambda _: ["m", "n"])
    with pytest.raises(ApiError, match="model"):
        await _parse(body, path="/generate")
    assert (await _parse({**body, "model": "m"}, path="/generate")).request.model == "m"
