"""Ask for a final usage event with the smallest change of a JSON body."""

from __future__ import annotations

import json

import orjson

from adapters.body import inserted

_ASKED = b'"stream_options":{"include_usage":true}'


def with_usage(body: bytes) -> bytes:
    """The body with ``stream_options.include_usage`` true.

    A body without ``stream_options`` gets the member inserted behind its opening brace, and no other byte
    changes. One that has it is parsed, the option set beside the client's own, and written again in the same
    order; that changes white space, escapes and the spelling of numbers, never a value. What is not a JSON object,
    or has options that the engine must refuse, comes back as it is.
    """
    if b'"stream_options"' in body:
        return _rewritten(body)
    return inserted(body, _ASKED)


def _rewritten(body: bytes) -> bytes:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(parsed, dict):
        return body
    if "stream_options" not in parsed:
        return inserted(body, _ASKED)
    options = parsed["stream_options"]
    if options is not None and not isinstance(options, dict):
        return body
    if options and options.get("include_usage") is True:
        return body
    return _spelled_out(body)


def _spelled_out(body: bytes) -> bytes:
    """By the standard library: it keeps whole numbers of any size, orjson makes floats of those beyond 64 bits."""
    try:
        parsed = json.loads(body)
        parsed["stream_options"] = {**(parsed["stream_options"] or {}), "include_usage": True}
        return json.dumps(parsed, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return body
