"""Bodies however they come: compressed, in chunks, too large, too late, and not what they say they are."""

from __future__ import annotations

import asyncio
import gzip
import io
import zlib
from collections.abc import AsyncIterator

import orjson
import pytest

from tests.gateway.rig import MODEL, Client, client, engine, gateway, idle, settings_for, settled

_CHAT = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]})
_TOKEN = {"authorization": "Bearer secret"}
_TIERS = orjson.dumps({"tiers": [{"name": "only", "tpot_ms": 80, "ttft_ms": 3000}], "default_tier": "only"})


async def _post(ask: Client, path: str, body: bytes, encoding: str) -> tuple[int, dict[str, object]]:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    async with ask.session.post(f"{ask.base}{path}", data=body, headers=headers) as answer:
        return answer.status, orjson.loads(await answer.read())


async def _put_tiers(
    ask: Client, body: bytes | io.BytesIO | AsyncIterator[bytes], **headers: str
) -> tuple[int, str, dict[str, object]]:
    url = f"{ask.base}/admin/v1/tiers"
    async with ask.session.put(url, data=body, headers=_TOKEN | headers) as answer:
        return answer.status, answer.content_type, orjson.loads(await answer.read())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_a_compressed_body_reaches_the_engine_as_what_it_is(path: str) -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        packings = (
            ("gzip", gzip.compress(_CHAT, mtime=0)),
            ("GZIP", gzip.compress(_CHAT, mtime=0)),
            ("deflate", zlib.compress(_CHAT)),
        )
        for encoding, packed in (*packings, ("identity", _CHAT)):
            status, _ = await _post(ask, path, packed, encoding)
            assert status == 200, encoding
        assert all("content-encoding" not in {name.lower() for name in sent} for sent in one.headers)
        assert all(body == orjson.loads(_CHAT) for body in one.seen)
        await settled(made)
        assert idle(made)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", _CHAT, 400),
        ("gzip", gzip.compress(_CHAT, mtime=0)[:-20], 400),
        ("deflate", b"\x78\x9c" + _CHAT, 400),
        ("deflate", zlib.compress(_CHAT)[:-10], 400),
        ("gzip, gzip", gzip.compress(gzip.compress(_CHAT, mtime=0), mtime=0), 415),
        ("rot13", _CHAT, 415),
    ],
)
async def test_a_body_that_is_not_what_it_says_is_the_clients_mistake(
    path: str, encoding: str, body: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        found, told = await _post(ask, path, body, encoding)
        error = told["error"]
        assert isinstance(error, dict)
        assert (found, error["type"]) == (status, "invalid_request_error"), told
        assert not one.seen
        assert (await ask.read_chat())[0] == 200
        assert not any(record.exc_info for record in caplog.records)
        assert not made.fleet.members()[0].suspected.is_set()
        await settled(made)
        assert idle(made)


async def test_a_small_body_that_becomes_large_is_too_large() -> None:
    limits = {"body_bytes": 100_000}
    async with engine() as one, gateway(settings_for(one, limits=limits)) as made, client(made) as ask:
        status, told = await _post(ask, "/v1/chat/completions", gzip.compress(b" " * 50_000_000, mtime=0), "gzip")
        assert (status, told["error"]) == (413, told["error"])
        assert "limits.body_bytes" in str(told)


async def test_tiers_are_bounded_as_they_come() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        for body in (endless(), io.BytesIO(b" " * ((1 << 20) + 1))):
            status, kind, told = await _put_tiers(ask, body)
            assert (status, kind, told["status"]) == (413, "application/problem+json", 413)
        for encoding, status in (("gzip", 400), ("rot13", 415)):
            found, kind, told = await _put_tiers(ask, _TIERS, **{"content-encoding": encoding})
            assert (found, kind, told["status"]) == (status, "application/problem+json", status)
        for default in ("ab" * 100_000, ["only"], None):
            status, _, told = await _put_tiers(ask, orjson.dumps({"tiers": [], "default_tier": default}))
            assert (status, len(str(told)) < 1_000) == (422, True)
        status, _, _ = await _put_tiers(ask, gzip.compress(_TIERS, mtime=0), **{"content-encoding": "gzip"})
        assert status == 200


async def test_tiers_that_do_not_arrive_are_given_up() -> None:
    async with engine() as one, gateway(settings_for(one, timeouts={"body_s": 0.2})) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        head = b"PUT /admin/v1/tiers HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n5\r\n{")
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split(b" ")[1] == b"400"
        assert b"application/problem+json" in answer
        writer.transport.abort()
