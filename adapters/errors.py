"""What an engine's error answers mean: statuses, error bodies, and errors inside a stream."""

from __future__ import annotations

import orjson

from adapters.contract import Failure, UpstreamError

_OVERLOAD_STATUSES = frozenset({429, 503})
_TIMEOUT_STATUSES = frozenset({408, 504})
_LENGTH_WORDS = (
    "maximum context length",  # vLLM, and SGLang of a prompt with its answer
    "longer than the model's context length",  # SGLang
    "`inputs` must have less than",  # TGI
    "`inputs` tokens + `max_new_tokens` must be",  # TGI
)
_OVERLOAD_WORDS = ("service unavailable", "overloaded", "too many requests", "rate_limit", "currently busy")


def failure_of_status(status: int) -> Failure:
    """429 and 503 are overload (vLLM's admission limits answer 503), other 4xx the client's, 5xx the engine's."""
    if status in _OVERLOAD_STATUSES:
        return Failure.OVERLOADED
    if status in _TIMEOUT_STATUSES:
        return Failure.TIMEOUT
    if status == 502:
        return Failure.UNREACHABLE
    return Failure.REJECTED if 400 <= status < 500 else Failure.BROKEN


def rejection(message: str, status: int | None = None) -> Failure:
    """What kind of rejection it is, by the words that vLLM, SGLang and TGI have for a request that is too long."""
    long = status == 413 or any(words in message for words in _LENGTH_WORDS)
    return Failure.TOO_LONG if long else Failure.REJECTED


def message_of(body: bytes) -> str | None:
    """The message of an error body: OpenAI's shape, vLLM's older flat one, FastAPI's, or TGI's; else None."""
    parsed = _load(body)
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    for found in (error, parsed.get("message"), parsed.get("detail")):
        if isinstance(found, str) and found:
            return found
    return None


def error_in_event(event: bytes) -> UpstreamError | None:
    """The error that an SSE event carries: an `error` member in its data, or the event name `error`.

    The bytes may hold more than one event; only the first with data is looked at.
    """
    if b"error" not in event:
        return None
    named = False
    for line in event.splitlines():
        if line.startswith(b"event:"):
            named = line[6:].strip() == b"error"
        elif line.startswith(b"data:"):
            return _error_of(line[5:].strip(), named)
    return None


def _error_of(data: bytes, named: bool) -> UpstreamError | None:
    parsed = _load(data)
    if not isinstance(parsed, dict):
        return UpstreamError(Failure.BROKEN, data.decode("utf-8", "replace")[:300]) if named else None
    error = parsed.get("error")
    flat = parsed.get("object") == "error" or parsed.get("type") == "error"
    if not (error or named or flat):
        return None
    details = error if isinstance(error, dict) else parsed
    message = message_of(data) or "the engine reported an error in its stream"
    for key in ("code", "status", "status_code"):
        code = details.get(key)
        if isinstance(code, str) and code.isdigit():
            code = int(code)
        if isinstance(code, int) and 400 <= code <= 599:
            failure = failure_of_status(code)
            if failure is Failure.REJECTED:
                failure = rejection(message, code)
            return UpstreamError(failure, message, code)
    kind = f"{details.get('type', '')} {details.get('code', '')} {message}".lower()
    overloaded = any(word in kind for word in _OVERLOAD_WORDS)
    return UpstreamError(Failure.OVERLOADED if overloaded else Failure.BROKEN, message)


def _load(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
