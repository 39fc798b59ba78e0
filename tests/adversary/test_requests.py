"""Hostile bytes and bodies: an honest 4xx that names the field, and nothing lost or broken inside."""

from __future__ import annotations

import asyncio
import gzip
import random
from collections.abc import Callable

import aiohttp
import orjson
import pytest

from tests.adversary.stand import ADMIN, CHAT, KEY, MODEL, Stand, body_of, chat, cut_chat, http, status_of

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-a\r\n"


def _nested(depth: int) -> object:
    value: object = {"a": 1}
    for _ in range(depth):
        value = [value]
    return value


def _raw(fields: str) -> bytes:
    """A chat body written out, for what no JSON writer writes."""
    return f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"x"}}],{fields}}}'.encode()


SLO = ["nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "3600001", "", "0x10", "1,5", "50ms"]
HEADERS = ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"]


@pytest.mark.parametrize("header", HEADERS)
async def test_a_pace_that_is_none_is_refused_by_its_name(stand: Stand, header: str) -> None:
    for value in SLO:
        answer = await stand.send(http(chat(), headers=[f"{header}: {value}".encode()]))
        assert (status_of(answer), orjson.loads(body_of(answer))["error"]["param"]) == (400, header), value
    await stand.settled()


WRONG: dict[str, list[object]] = {
    "max_tokens": [0, -1, 10**12, 1.5, "5", True, [1]],
    "n": [0, -1, 1025, 1.0, "1", True],
    "stream": ["x", 1, [], {}],
    "model": [None, [], ["x"], {}, 5, "", True, "nope", "\0"],
    "messages": [None, [], {}, "x", 5, [None], [5], [{"role": "user", "content": 5}]],
    "service_tier": ["weird", "", 5, True, ["fast"], {"a": 1}],
    "stream_options": [5, "x"],
}
FIELDS = [(name, value) for name, values in WRONG.items() for value in values]


async def test_a_wrong_field_is_refused_by_its_name(stand: Stand) -> None:
    for name, value in FIELDS:
        answer = await stand.send(http(chat(**{name: value})))
        error = orjson.loads(body_of(answer))["error"]
        assert status_of(answer) in {400, 404}, (name, value, answer)
        assert error["param"] == name, (name, value, error)
        assert error["type"] == "invalid_request_error", (name, value, error)
        assert name in error["message"], (name, value, error)
    await stand.settled()


def _chunked(chunks: bytes) -> bytes:
    return HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunks


UNREADABLE: dict[str, bytes] = {
    "length and chunks": HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 5\r\n\r\n{}",
    "negative length": HEAD + b"content-length: -5\r\n\r\n{}",
    "endless length": HEAD + b"content-length: 99999999999999999999999\r\n\r\n{}",
    "bad chunk": _chunked(b"zz\r\nabc\r\n0\r\n\r\n"),
    "long header": HEAD + b"x: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "many headers": HEAD + b"".join(b"x%d: a\r\n" % number for number in range(20_000)) + b"\r\n",
    "long path": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "NUL in a header": http(chat(), headers=[b"x-slo-tier: a\0b"]),
    "folded header": HEAD + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
    "no HTTP": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300,
    "deep body": http(b"[" * 100_000 + b"]" * 100_000),
    "infinite number": http(_raw('"max_tokens":1e400')),
    "NaN": http(_raw('"max_tokens":NaN')),
    "lone surrogate": http(_raw('"user":"\\ud800"')),
    "no JSON": http(b"\xff\xfe"),
    "empty": http(b""),
    "list": http(b"[]"),
    "two documents": http(b"{}{}"),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_what_cannot_be_read_is_told_in_json(stand: Stand, name: str) -> None:
    answer = await stand.send(UNREADABLE[name])
    assert status_of(answer) == 400
    assert orjson.loads(body_of(answer))["error"]["type"] == "invalid_request_error"
    await stand.settled()


async def test_a_body_beyond_the_limit_is_413_however_it_comes(stand: Stand) -> None:
    whole = http(b'{"a":"' + b"x" * 17_000_000 + b'"}')
    chunks = _chunked((b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 17 + b"0\r\n\r\n")
    bomb = gzip.compress(b" " * 60_000_000)
    packed = http(bomb, headers=[b"content-encoding: gzip"])
    for data in (whole, chunks, packed):
        answer = await stand.send(data)
        assert status_of(answer) == 413
        assert orjson.loads(body_of(answer))["error"]["code"] == "body_too_large"
    await stand.settled()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(http(chat(), key=b"\xff\xfe"), 401, id="key"),
        pytest.param(http(b"", "/v1/models", method="GET", key=b"\xff"), 401, id="key of a small question"),
        pytest.param(http(b"", "/admin/v1/state", method="GET", key=b"\xff"), 401, id="admin token"),
        pytest.param(http(chat(), headers=[b"x-slo-tier: \xff"]), 400, id="tier"),
        pytest.param(http(chat(), headers=[b"x-slo-ttft-ms: \xff"]), 400, id="pace"),
        pytest.param(http(chat(), headers=[b"x-session-id: \xff"]), 200, id="session"),
        pytest.param(http(b"{}", "/v1/%ff%fe"), 404, id="path"),
    ],
)
async def test_bytes_that_are_no_text_break_nothing(stand: Stand, data: bytes, status: int) -> None:
    assert status_of(await stand.send(data)) == status


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(chat(tools=_nested(230)), id="tools within what a JSON writer takes"),
        pytest.param(chat(tools=_nested(400)), id="tools"),
        pytest.param(
            chat(messages=[{"role": "assistant", "content": "x", "tool_calls": _nested(400)}]), id="tool calls"
        ),
    ],
)
async def test_deep_nesting_is_no_error_of_the_gateway(stand: Stand, body: dict[str, object]) -> None:
    data = str(body).replace("'", '"').encode()
    assert status_of(await stand.send(http(data))) in {200, 400}


async def test_a_compressed_body_is_read_or_refused_and_hurts_no_backend(stand: Stand) -> None:
    packed = gzip.compress(orjson.dumps(chat()))
    for data in (packed, b"no gzip at all", packed[:-9]):
        answer = await stand.send(http(data, headers=[b"content-encoding: gzip"]))
        assert status_of(answer) in {200, 400, 415}, answer[:400]


async def test_an_error_does_not_send_megabytes_back(stand: Stand) -> None:
    for field in ("model", "service_tier"):
        answer = await stand.send(http(chat(**{field: "ab" * 500_000})))
        assert status_of(answer) in {400, 404}
        assert len(answer) < 10_000, field


TIERS: list[tuple[object, int]] = [
    (b"{", 400),
    (b"[]", 400),
    ({}, 400),
    ({"tiers": [], "x": 1}, 400),
    ({"tiers": []}, 422),
    ({"tiers": 5}, 422),
    ({"tiers": [{}]}, 422),
    ({"tiers": [{"name": "a", "tpot_ms": -1, "ttft_ms": 1}], "default_tier": "a"}, 422),
    ({"tiers": [{"name": "a", "tpot_ms": "nan", "ttft_ms": 1}], "default_tier": "a"}, 422),
    ({"tiers": [{"name": "a", "tpot_ms": 1e300, "ttft_ms": 1}], "default_tier": "a"}, 422),
    ({"tiers": [{"name": "a", "tpot_ms": 5, "ttft_ms": 1}], "default_tier": None}, 422),
    ({"tiers": [{"name": "a", "tpot_ms": 5, "ttft_ms": 1}] * 2, "default_tier": "a"}, 422),
]


async def test_tiers_that_cannot_be_are_a_problem_and_change_nothing(stand: Stand) -> None:
    ask = http(b"", "/admin/v1/tiers", method="GET", key=ADMIN.encode())
    before = body_of(await stand.send(ask))
    for body, status in TIERS:
        answer = await stand.send(http(body, "/admin/v1/tiers", method="PUT", key=ADMIN.encode()))
        assert status_of(answer) == status, (body, answer)
        assert orjson.loads(body_of(answer))["status"] == status
    good = {"tiers": [{"name": "a", "ttft_ms": 1, "tpot_ms": 1}], "default_tier": "a"}
    for key, match, status in ((ADMIN, b'"zz"', 412), (KEY, b"*", 401), ("", b"*", 401)):
        headers = [b"if-match: " + match]
        data = http(good, "/admin/v1/tiers", method="PUT", key=key.encode(), headers=headers)
        assert status_of(await stand.send(data)) == status
    assert body_of(await stand.send(ask)) == before
    await stand.settled()


async def test_tiers_that_are_too_many_bytes_are_a_problem_in_chunks_too(stand: Stand) -> None:
    head = b"PUT /admin/v1/tiers HTTP/1.1\r\nhost: x\r\nauthorization: Bearer adm\r\nconnection: close\r\n"
    chunks = (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 17 + b"0\r\n\r\n"
    answer = await stand.send(head + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    assert status_of(answer) == 413
    assert orjson.loads(body_of(answer))["status"] == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *((method, CHAT, 405) for method in ("GET", "HEAD", "PUT", "OPTIONS", "DELETE")),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "//v1/chat/completions", 404),
        ("GET", "/v1/../admin/v1/state", 404),
        ("GET", "/v1/models/nope", 404),
        ("DELETE", "/admin/v1/tiers", 401),
        ("OPTIONS", "*", 404),
    ],
)
async def test_wrong_methods_and_paths(stand: Stand, method: str, path: str, status: int) -> None:
    assert status_of(await stand.send(http(b"", path, method=method))) == status


async def test_half_a_request_holds_nothing(stand: Stand) -> None:
    data = http(chat())
    for cut in (5, 60, len(data) - 5):
        await stand.send(data[:cut], half_closed=True)
    kept = http(chat()).replace(b"connection: close\r\n", b"")
    answers = await stand.send(kept * 3 + data)
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    await stand.settled()


async def test_500_clients_that_hang_up_leave_nothing(stand: Stand) -> None:
    rng = random.Random(7)
    pick: Callable[..., object] = rng.choice
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        sent = []
        for number in range(500):
            body = chat(stream=number % 5 > 0, max_tokens=pick([1, 20, 2000]), n=pick([1, 1, 3]))
            body["messages"] = [{"role": "user", "content": "w " * rng.choice([1, 50, 1000])}]
            tier = rng.choice(["t75", "t100", "t150", "t300", None])
            headers = {"authorization": f"Bearer {KEY}"} | ({} if tier is None else {"x-slo-tier": tier})
            cut_s = rng.choice([0.02, 0.2, 1.0, 2.0])
            sent.append(tasks.create_task(cut_chat(session, stand.port, body, headers, cut_s)))
    statuses = {task.result() for task in sent}
    assert statuses <= {None, 200, 429}
    assert 200 in statuses
    await stand.settled()
    assert status_of(await stand.send(http(chat()))) == 200
