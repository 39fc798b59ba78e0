"""Ids filled into answers that have empty ones, however their bytes are cut."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.contract import UpstreamCall
from adapters.minted import MintedIds

EVENT = b'{"object":"chat.completion.chunk","id":"","created":1,"choices":[{"delta":{"content":"%b"}}]}'
TOOL = b'{"object":"chat.completion.chunk","id":"","choices":[{"delta":{"tool_calls":[{"id":"","name":"f"}]}}]}'
TEXT = b'{"object":"text_completion","id":"","choices":[{"text":"x"}]}'
TRICKY = EVENT % orjson.dumps('{"object":"chat.completion.chunk","id":""')[1:-1]
STREAM = b"".join(
    b"data: %b\n\n" % one
    for one in (EVENT % b"a", TOOL, TEXT, TRICKY, b'{"id":""}', b'{"error":"x"}', b"[DONE]", b"{")
)
FILLED = STREAM.replace(b'.chunk","id":""', b'.chunk","id":"chatcmpl-r"').replace(
    b'text_completion","id":""', b'text_completion","id":"cmpl-r"'
)


@dataclass(slots=True)
class Pieces:
    """An answer that comes in these pieces."""

    pieces: list[bytes]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-length": "9", "content-type": "x"})
    aborted: bool = False
    released: bool = False

    async def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def read_all(self, limit_bytes: int) -> bytes:
        rest, self.pieces = b"".join(self.pieces), []
        return rest

    def abort(self) -> None:
        self.aborted = True

    def release(self) -> None:
        self.released = True


@dataclass(slots=True)
class Source:
    """An upstream with one answer."""

    answer: Pieces
    closed: bool = False

    async def open(self, call: UpstreamCall) -> Pieces:
        return self.answer

    async def close(self) -> None:
        self.closed = True


async def read(pieces: Sequence[bytes], name: str | None = "r") -> list[bytes]:
    """What is read of an answer, piece by piece."""
    headers = {} if name is None else {"x-request-id": name}
    answer = await MintedIds(Source(Pieces(list(pieces)))).open(UpstreamCall("POST", "/x", headers, b""))
    got = []
    while data := await answer.read():
        got.append(data)
    assert await answer.read() == b""
    return got


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(set(places)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if data[a:b]]


@settings(max_examples=60)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_however_it_is_cut(places: list[int]) -> None:
    assert b"".join(asyncio.run(read(cut(STREAM, places)))) == FILLED


def test_cut_at_every_byte() -> None:
    assert b"".join(asyncio.run(read(cut(STREAM, range(len(STREAM)))))) == FILLED


async def test_whole_events_are_not_held_back() -> None:
    pieces = [b"data: " + EVENT % b"a" + b"\n\n"] * 3
    assert len(await read(pieces)) == 3


def test_only_where_tgi_writes_it() -> None:
    assert FILLED.count(b"-r") == 4
    assert b'"tool_calls":[{"id":""' in FILLED
    assert orjson.dumps('{"object":"chat.completion.chunk","id":""')[1:-1] in FILLED


@pytest.mark.parametrize("name", ['a"b', "a\\b", "\u00fc", "\n"])
async def test_an_id_of_any_letters_leaves_json(name: str) -> None:
    (got,) = await read([EVENT % b"a"], name)
    assert orjson.loads(got)["id"] == f"chatcmpl-{name}"


async def test_nothing_without_an_id() -> None:
    assert await read([STREAM], None) == [STREAM]


async def test_a_whole_answer_and_the_rest_of_the_protocol() -> None:
    source = Source(Pieces([b'{"object":"chat.completion","id":"","x":1}']))
    upstream = MintedIds(source)
    answer = await upstream.open(UpstreamCall("POST", "/x", {"x-request-id": "r"}, b""))
    assert (answer.status, answer.headers) == (200, {"content-type": "x"})
    assert orjson.loads(await answer.read_all(999))["id"] == "chatcmpl-r"
    answer.abort()
    answer.release()
    await upstream.close()
    assert (source.answer.aborted, source.answer.released, source.closed) == (True, True, True)
    assert upstream.inner is source
