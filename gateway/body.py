"""A request's body, read within a size and a time whoever asks, and decompressed on the way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from gateway.errors import InvalidRequest, TooLarge, UnknownEncoding, UnreadableBody
from gateway.words import quoted

# What aiohttp always decompresses; with other packages installed it knows more, which clients must not rely on.
_ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})


@dataclass(frozen=True, slots=True)
class BodyBound:
    """How much of a body is taken, after decompression, and within what time. `told_as` names the limit."""

    limit_bytes: int
    within_s: float
    told_as: str


async def read_body(http: web.BaseRequest, bound: BodyBound) -> bytes:
    """The body, decompressed. Raises TooLarge, UnknownEncoding, UnreadableBody; InvalidRequest when it is late."""
    if http.content_length is not None and http.content_length > bound.limit_bytes:
        raise _too_large(bound)
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise UnknownEncoding(
            f"content-encoding: gzip, deflate or none is taken, not {quoted(encoding)}",
            param="content-encoding",
            code="unsupported_encoding",
        )
    if http.headers.get("expect", "").lower() == "100-continue":
        await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        http.writer.output_size = 0
    try:
        if http.content.is_eof():  # all of it is here, as for most requests: no timer is needed
            return await _whole(http, bound)
        async with asyncio.timeout(bound.within_s):
            return await _whole(http, bound)
    except TimeoutError:
        raise InvalidRequest("the body did not arrive in time", code="body_timeout") from None
    except web.RequestPayloadError:
        told = "does not fit its transfer-encoding" if encoding in {"", "identity"} else f"is not {encoding}"
        raise UnreadableBody(f"the body cannot be read: it {told}", code="bad_body") from None


async def _whole(http: web.BaseRequest, bound: BodyBound) -> bytes:
    content = http.content
    # Fewer pauses between the socket and here; a compressed body grows by at most this much at once.
    content.set_read_chunk_size(bound.limit_bytes)
    body = bytearray()
    while chunk := await content.readany():
        body += chunk
        if len(body) > bound.limit_bytes:
            raise _too_large(bound)
    return bytes(body)


def _too_large(bound: BodyBound) -> TooLarge:
    return TooLarge(f"the body is larger than {bound.limit_bytes} bytes{bound.told_as}", code="body_too_large")
