"""What a client can be told went wrong. Each error knows its HTTP status and its OpenAI type."""

from __future__ import annotations

import math
from enum import Enum
from typing import ClassVar

import orjson

from scheduling.decisions import Refusal, RefusalKind


class Dialect(Enum):
    """Whose words an answer is in."""

    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI, with its own stream events
    ANTHROPIC = "anthropic"
    TGI = "tgi"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than success. `param` names the field at fault, `code` is for programs."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "api_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def headers(self) -> dict[str, str]:
        """What the answer carries beside its body."""
        return {}

    def body(self, dialect: Dialect = Dialect.OPENAI) -> bytes:
        """The error as JSON, in the client's dialect."""
        if dialect is Dialect.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return orjson.dumps({"type": "error", "error": {"type": kind, "message": self.message}})
        if dialect is Dialect.TGI:
            return orjson.dumps({"error": self.message, "error_type": self.code or self.kind})
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )

    def event(self, dialect: Dialect) -> bytes:
        """The error as the last event of a stream that had begun."""
        if dialect is Dialect.ANTHROPIC:
            return b"event: error\ndata: " + self.body(dialect) + b"\n\n"
        if dialect is Dialect.TGI:
            return b"data:" + self.body(dialect) + b"\n\n"
        if dialect is Dialect.RESPONSES:
            data = {"type": "error", "code": self.code, "message": self.message, "param": self.param}
            return b"event: error\ndata: " + orjson.dumps(data) + b"\n\n"
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"


class InvalidRequest(ApiError):
    """The request itself is wrong; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class UnreadableBody(InvalidRequest):
    """The body is not in the encoding that it claims; the connection is of no use after it."""

    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


class Unauthorized(ApiError):
    status = 401
    kind = "authentication_error"


class NotFound(ApiError):
    status = 404
    kind = "invalid_request_error"


class WrongMethod(ApiError):
    status = 405
    kind = "invalid_request_error"


class TooLarge(ApiError):
    status = 413
    kind = "invalid_request_error"


class UnknownEncoding(ApiError):
    """The body is compressed in a way that nothing here can read."""

    status = 415
    kind = "invalid_request_error"


class Refused(ApiError):
    """The promise cannot be kept: come back in `retry_after_s`, or not at all when that is None."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, code: str, retry_after_s: float | None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        wait_s = max(self.retry_after_s, 0.001)
        return {"Retry-After": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1e3))}


class UpstreamFailed(ApiError):
    """Every backend that was tried failed, or the one in use broke off."""

    status = 502
    kind = "upstream_error"


class Unavailable(ApiError):
    """No backend is up, or the gateway is going down."""

    status = 503
    kind = "service_unavailable_error"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


def of_refusal(refusal: Refusal, prompt_field: str) -> ApiError:
    """The answer to a request that the dispatcher turned away. `prompt_field` is where its prompt stood."""
    code = refusal.kind.value
    match refusal.kind:
        case RefusalKind.TOO_LATE | RefusalKind.SATURATED:
            return Refused(refusal.message, code=code, retry_after_s=refusal.retry_after_s)
        case RefusalKind.TOO_LONG:
            return InvalidRequest(refusal.message, param=prompt_field, code="context_length_exceeded")
        case RefusalKind.NO_BACKEND:
            return Unavailable(refusal.message, code=code)
        case RefusalKind.FAILED:
            return UpstreamFailed(refusal.message, code=code)
