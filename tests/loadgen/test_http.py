"""The small HTTP client: framing cut anywhere, reuse, and servers that break off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.http import HttpError, HttpPool, _ChunkDecoder, parse_head

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Collected:
    """A sink that keeps everything; a body of `poison` makes it raise."""

    errors = (KeyError,)

    def __init__(self, poison: bytes = b"\0") -> None:
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self.body = b""
        self._poison = poison

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes) -> None:
        self.body += data
        if self._poison in data:
            raise KeyError("poison")


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


class Wire:
    """A TCP server that talks as a test says; counts its connections."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/x"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, as some tests want
        finally:
            writer.close()


async def post(url: str, sink: Collected, times: int = 1) -> None:
    pool = HttpPool(url, 5.0)
    try:
        for _ in range(times):
            await pool.post({"x-a": "b"}, b"hello", sink)
    finally:
        await pool.close()


def sends(*parts: bytes, rounds: int = 1) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(rounds):
            assert await read_request(reader) == b"hello"
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.002)

    return talk


@given(
    body=st.binary(min_size=1, max_size=200),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 1000), max_size=25),
)
def test_chunks_cut_anywhere(body: bytes, sizes: list[int], cuts: list[int]) -> None:
    wire, at = b"", 0
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        if piece:
            wire += b"%x;ext=1\r\n%s\r\n" % (len(piece), piece)
        at += size
    wire += b"0\r\nTrailer: x\r\n\r\n"
    decoder, found, start = _ChunkDecoder(), b"", 0
    for cut in [*sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]:
        found += decoder.feed(wire[start:cut])
        start = cut
    assert found == body
    assert decoder.ended


def test_bytes_of_an_unfinished_chunk_are_not_held_back() -> None:
    assert _ChunkDecoder().feed(b"a\r\n01234") == b"01234"


@pytest.mark.parametrize("line", [b"zz", b"-5", b""])
def test_a_wrong_chunk_size_is_named(line: bytes) -> None:
    with pytest.raises(HttpError, match="hexadecimal"):
        _ChunkDecoder().feed(line + b"\r\n")


@pytest.mark.parametrize("head", [b"SMTP ready", b"HTTP/1.1 abc", b"HTTP/1.1 200 OK\r\nno colon here"])
def test_a_wrong_head_is_named(head: bytes) -> None:
    with pytest.raises(HttpError):
        parse_head(head)


@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r", b"\nbo", b"dy"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", b"content-length:4\r\n\r\nbody"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n", b"2\r\ndy\r", b"\n0\r\n\r\n"),
    ],
)
async def test_every_framing_is_read_and_the_connection_kept(parts: tuple[bytes, ...]) -> None:
    async with Wire(sends(*parts, rounds=3)) as wire:
        sink = Collected()
        await post(wire.url, sink, times=3)
        assert (sink.status, sink.body) == (200, b"body" * 3)
        assert wire.connections == 1


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async with Wire(sends(b"HTTP/1.1 200 OK\r\n\r\nbo", b"dy")) as wire:
        sink = Collected()
        await post(wire.url, sink, times=2)
        assert sink.body == b"body" * 2
        assert wire.connections == 2


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    async with Wire(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")) as wire:
        pool = HttpPool(wire.url, 5.0)
        sink = Collected()
        await pool.post({}, b"hello", sink)
        await pool.post({}, b"hello", sink)
        assert (sink.body, wire.connections) == (b"xx", 2)
        await pool.close()


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\ntoo long",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"garbage\r\n\r\n",
    ],
)
async def test_a_server_that_breaks_off_is_an_error(part: bytes) -> None:
    async with Wire(sends(part)) as wire:
        with pytest.raises(HttpError):
            await post(wire.url, Collected())


async def test_what_a_sink_raises_ends_the_exchange() -> None:
    async with Wire(sends(b"HTTP/1.1 200 OK\r\n\r\nbad poison", b"more")) as wire:
        with pytest.raises(KeyError):
            await post(wire.url, Collected(b"poison"))


async def test_cancelling_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        assert await reader.read() == b""
        gone.set()

    async with Wire(talk) as wire:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await post(wire.url, Collected())
        async with asyncio.timeout(5):
            await gone.wait()


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:80", "http:///v1"])
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        HttpPool(url, 1.0)
