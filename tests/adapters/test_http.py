"""The upstream against servers that answer well, badly, late or not at all."""

from __future__ import annotations

import asyncio
import gzip
import random
import re

import pytest

from adapters.contract import Failure, UpstreamCall, UpstreamError
from adapters.http import HttpOptions, HttpUpstream

from .conftest import PATIENCE_S, Connect, Serve, Wire, until

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
POST = UpstreamCall("POST", "/v1/completions", {"content-type": "application/json"}, b'{"prompt":"a"}')


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def whole(upstream: HttpUpstream, call: UpstreamCall = POST) -> bytes:
    response = await upstream.open(call)
    return await response.read_all(1 << 30)


async def failing(upstream: HttpUpstream, call: UpstreamCall = POST) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await whole(upstream, call)
    told = str(caught.value)
    assert not re.search(r"[a-z](Error|Exception)\b|aiohttp|message=", told), "clients read it"
    return caught.value


class TestBytes:
    @pytest.mark.parametrize("seed", range(8))
    async def test_are_the_servers_wherever_chunks_and_packets_end(
        self, serve: Serve, connect: Connect, seed: int
    ) -> None:
        chance = random.Random(seed)
        body = b"".join(b"data: " + chance.randbytes(chance.randrange(300)) + b"\n\n" for _ in range(200))

        async def script(wire: Wire) -> None:
            await wire.request()
            encoded = bytearray(CHUNKED)
            rest = body
            while rest:
                size = min(chance.choice((1, 2, 7, 100, 5000)), len(rest))
                encoded += chunk(rest[:size])
                rest = rest[size:]
            encoded += chunk(b"")
            while encoded:
                size = chance.choice((1, 3, 50, 1400, 20000))
                await wire.send(bytes(encoded[:size]))
                del encoded[:size]
                await asyncio.sleep(0)

        assert await whole(connect((await serve(script)).url)) == body

    async def test_come_as_they_arrive(self, serve: Serve, connect: Connect) -> None:
        """The first event is readable while the server has not sent the second."""
        go_on = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED + chunk(b"data: 1\n\n"))
            await go_on.wait()
            await wire.send(chunk(b"data: 2\n\n") + chunk(b""))

        response = await connect((await serve(script)).url).open(POST)
        assert await response.read() == b"data: 1\n\n"
        go_on.set()
        assert await response.read() == b"data: 2\n\n"
        assert await response.read() == b""
        assert await response.read() == b""

    async def test_of_a_compressed_answer_stay_compressed(self, serve: Serve, connect: Connect) -> None:
        packed = gzip.compress(b"x" * 1000)

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.answer(packed, b"Content-Encoding: gzip\r\n")

        assert await whole(connect((await serve(script)).url)) == packed

    async def test_until_the_connection_ends(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")

        assert await whole(connect((await serve(script)).url)) == b"hello"

    async def test_of_the_request_are_what_was_given(self, serve: Serve, connect: Connect) -> None:
        bodies: list[bytes] = []

        async def script(wire: Wire) -> None:
            bodies.append(await wire.request())
            await wire.answer(b"")

        server = await serve(script)
        call = UpstreamCall("POST", "/a%20b?c=d", {"X-One": "1", "authorization": "Bearer k"}, b"{ }\n")
        await whole(connect(server.url), call)
        assert bodies == [b"{ }\n"]
        line, *headers = server.heads[0].decode().strip().split("\r\n")
        assert line == "POST /a%20b?c=d HTTP/1.1"
        names = sorted(header.split(":")[0].lower() for header in headers)
        assert names == ["authorization", "content-length", "host", "x-one"]


class TestHead:
    async def test_status_and_headers(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(b"HTTP/1.1 503 Busy\r\nX-One: 1\r\nx-one: 2\r\nContent-Length: 2\r\n\r\n{}")

        response = await connect((await serve(script)).url).open(POST)
        assert response.status == 503
        assert response.headers["x-one"] == "1, 2"
        assert await response.read_all(10) == b"{}"

    async def test_a_redirect_is_not_followed(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")

        response = await connect((await serve(script)).url).open(POST)
        assert response.status == 307
        response.release()


class TestFailures:
    async def test_nobody_listens(self, connect: Connect, serve: Serve) -> None:
        error = await failing(connect("http://127.0.0.1:1"))
        assert error.failure is Failure.UNREACHABLE
        assert error.retryable
        assert str(error) == "http://127.0.0.1:1 cannot be reached: Connection refused"

    @pytest.mark.parametrize(
        "answer",
        [
            b"\x00\xff\x17garbage\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 banana\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        ],
        ids=["bytes", "ssh", "status", "length", "huge-header"],
    )
    async def test_garbage_instead_of_a_head(self, serve: Serve, connect: Connect, answer: bytes) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(answer)

        upstream = connect((await serve(script)).url)
        assert (await failing(upstream)).failure is Failure.BROKEN
        await until(lambda: upstream.open_connections == 0)

    async def test_garbage_instead_of_a_chunk(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED + chunk(b"good") + b"no chunk size\r\n")
            await wire.gone()

        upstream = connect((await serve(script)).url)
        assert (await failing(upstream)).failure is Failure.BROKEN
        await until(lambda: upstream.open_connections == 0)

    @pytest.mark.parametrize("head", [CHUNKED, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
    async def test_a_close_in_mid_stream(self, serve: Serve, connect: Connect, head: bytes) -> None:
        read = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(head + (chunk(b"first") if head is CHUNKED else b"first"))
            await read.wait()

        upstream = connect((await serve(script)).url)
        response = await upstream.open(POST)
        assert await response.read() == b"first"
        read.set()
        with pytest.raises(UpstreamError) as caught:
            await response.read()
        assert caught.value.failure is Failure.BROKEN
        assert str(caught.value).endswith(
            "the bytes ended early, or were not in the encoding that its headers claim"
        )
        assert upstream.open_exchanges == 0
        await until(lambda: upstream.open_connections == 0)

    async def test_a_close_without_an_answer_is_not_retried_on_a_new_connection(
        self, serve: Serve, connect: Connect
    ) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()

        server = await serve(script)
        assert (await failing(connect(server.url))).failure is Failure.UNREACHABLE
        assert server.connections == 1

    async def test_a_late_head_times_out_and_the_engine_sees_it(self, serve: Serve, connect: Connect) -> None:
        gone = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.gone()
            gone.set()

        upstream = connect((await serve(script)).url)
        error = await failing(upstream, UpstreamCall("POST", "/", {}, b"{}", timeout_s=0.05))
        assert error.failure is Failure.TIMEOUT
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()
        assert upstream.open_connections == 0

    async def test_a_header_that_cannot_be_sent_is_the_requests_fault(
        self, serve: Serve, connect: Connect
    ) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()

        upstream = connect((await serve(script)).url)
        error = await failing(upstream, UpstreamCall("POST", "/", {"x": "a\r\nb: c"}, b""))
        assert error.failure is Failure.REJECTED
        assert not error.retryable

    async def test_after_close(self, connect: Connect) -> None:
        upstream = connect("http://127.0.0.1:1")
        await upstream.close()
        assert (await failing(upstream)).failure is Failure.UNREACHABLE

    @pytest.mark.parametrize(
        "url",
        ["", "localhost:80", "ftp://h", "http://", "http://h?a=b", "http://h#f", "http://h:99999", "http://a b"],
    )
    def test_an_unusable_url_is_named(self, url: str) -> None:
        with pytest.raises(ValueError, match="backend URL"):
            HttpUpstream(url)


class TestKeepAlive:
    async def test_one_connection_serves_one_request_after_another(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            while True:
                await wire.answer(await wire.request())

        server = await serve(script)
        upstream = connect(server.url)
        for _ in range(5):
            assert await whole(upstream) == POST.body
        assert server.connections == 1
        assert (upstream.open_connections, upstream.open_exchanges) == (1, 0)

    @pytest.mark.parametrize("reset", [False, True])
    async def test_a_reused_connection_that_dies_is_replaced_once(
        self, serve: Serve, connect: Connect, reset: bool
    ) -> None:
        """The server closes an idle connection just as the next request arrives on it."""

        async def script(wire: Wire) -> None:
            await wire.answer(await wire.request())
            await wire.reader.read(1) if wire.number == 1 else await wire.gone()
            if reset:
                wire.writer.transport.abort()

        server = await serve(script)
        upstream = connect(server.url)
        assert await whole(upstream) == POST.body
        assert await whole(upstream) == POST.body
        assert server.connections == 2

    async def test_replaced_only_once(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            body = await wire.request()
            if wire.number == 1:
                await wire.answer(body)
                await wire.reader.read(1)

        server = await serve(script)
        upstream = connect(server.url)
        assert await whole(upstream) == POST.body
        assert (await failing(upstream)).failure is Failure.UNREACHABLE
        assert server.connections == 2

    async def test_not_once_an_answer_has_begun(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.answer(await wire.request())
            await wire.request()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-")

        server = await serve(script)
        upstream = connect(server.url)
        assert await whole(upstream) == POST.body
        await failing(upstream)
        assert server.connections == 1

    async def test_an_answer_left_unread_does_not_go_back(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED + chunk(b"more to come"))
            await wire.gone()

        upstream = connect((await serve(script)).url)
        (await upstream.open(POST)).release()
        await until(lambda: upstream.open_connections == 0)


class TestAbort:
    async def test_the_engine_sees_it(self, serve: Serve, connect: Connect) -> None:
        gone = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED + chunk(b"data: 1\n\n"))
            await wire.gone()
            gone.set()

        upstream = connect((await serve(script)).url)
        response = await upstream.open(POST)
        assert await response.read() == b"data: 1\n\n"
        response.abort()
        response.abort()
        response.release()
        assert await response.read() == b""
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()
        assert (upstream.open_connections, upstream.open_exchanges) == (0, 0)

    async def test_cancelling_open_closes_the_connection(self, serve: Serve, connect: Connect) -> None:
        arrived, gone = asyncio.Event(), asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            arrived.set()
            await wire.gone()
            gone.set()

        upstream = connect((await serve(script)).url)
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            opening = tasks.create_task(upstream.open(POST))
            await arrived.wait()
            opening.cancel()
            await gone.wait()
        assert opening.cancelled()
        assert upstream.open_exchanges == 0

    async def test_a_reader_that_is_cancelled_can_still_abort(self, serve: Serve, connect: Connect) -> None:
        gone = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED)
            await wire.gone()
            gone.set()

        response = await connect((await serve(script)).url).open(POST)
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(response.read())
            await asyncio.sleep(0.01)
            reading.cancel()
        response.abort()
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()


class TestFlood:
    async def test_not_reading_holds_the_server_back(self, serve: Serve, connect: Connect) -> None:
        """The server sends as fast as it is let; it must stop far from the end, and end when it is read."""
        piece = chunk(b"x" * 65536)
        pieces = 1024
        sent = 0

        async def script(wire: Wire) -> None:
            nonlocal sent
            await wire.request()
            await wire.send(CHUNKED)
            for _ in range(pieces):
                await wire.send(piece)
                sent += 1
            await wire.send(chunk(b""))

        response = await connect((await serve(script)).url, HttpOptions(buffer_bytes=16384)).open(POST)
        before = -1
        while sent != before or sent == 0:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < pieces // 2
        held = len(await response.read())
        assert held < 1 << 20
        assert held + len(await response.read_all(1 << 30)) == pieces * 65536

    async def test_a_whole_body_beyond_the_limit(self, serve: Serve, connect: Connect) -> None:
        gone = asyncio.Event()

        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(CHUNKED)
            try:
                while True:
                    await wire.send(chunk(b"x" * 65536))
            finally:
                gone.set()

        response = await connect((await serve(script)).url).open(POST)
        with pytest.raises(UpstreamError, match="longer than 100000 bytes") as caught:
            await response.read_all(100_000)
        assert caught.value.failure is Failure.BROKEN
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()

    async def test_an_announced_body_beyond_the_limit_is_not_read(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n")
            await wire.gone()

        response = await connect((await serve(script)).url).open(POST)
        with pytest.raises(UpstreamError, match="longer than"):
            await response.read_all(1000)

    async def test_exactly_at_the_limit_is_read(self, serve: Serve, connect: Connect) -> None:
        async def script(wire: Wire) -> None:
            await wire.request()
            await wire.answer(b"x" * 1000)

        response = await connect((await serve(script)).url).open(POST)
        assert len(await response.read_all(1000)) == 1000
