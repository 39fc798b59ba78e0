"""A request's promise in its body, where a driven vLLM reads it: among ``vllm_xargs``."""

from __future__ import annotations

import json

import orjson

from adapters.body import inserted
from tiergate_engine.control import Promise

_MEMBER = b'"vllm_xargs"'
_OURS = "tiergate_"


def with_promise(body: bytes, promise: Promise | None) -> bytes:
    """The body with the promise, and without what its client says in its place.

    A body without ``vllm_xargs`` gets the member inserted behind its opening brace, and no other byte changes. One
    that has it is parsed and written again, which changes white space, escapes and the spelling of numbers, never
    a value. What is not a JSON object comes back as it is.
    """
    xargs = {} if promise is None else promise.to_xargs()
    if _MEMBER in body:
        return _rewritten(body, xargs)
    return inserted(body, _MEMBER + b":" + orjson.dumps(xargs)) if xargs else body


def _rewritten(body: bytes, xargs: dict[str, int | float]) -> bytes:
    """By the standard library: it keeps whole numbers of any size, orjson makes floats of those beyond 64 bits."""
    try:
        parsed = json.loads(body)
        if not isinstance(parsed, dict):
            return body
        given = parsed.get("vllm_xargs")
        if given is None:
            given = {}
        elif not isinstance(given, dict):
            return body  # the engine refuses it
        kept = {name: value for name, value in given.items() if not name.startswith(_OURS)}
        if kept == given and not xargs:
            return body
        parsed["vllm_xargs"] = {**kept, **xargs}
        return json.dumps(parsed, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return body
