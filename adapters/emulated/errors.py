"""Errors in vLLM's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from http import HTTPStatus

import orjson

BUSY_MESSAGE = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault, `kind` is vLLM's word for the type."""

    def __init__(self, status: int, message: str, kind: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = HTTPStatus(status).phrase if kind is None else kind
        self.param = param

    def body(self) -> bytes:
        """The JSON an HTTP answer carries."""
        return orjson.dumps(
            {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}
        )

    def event(self) -> bytes:
        """The same as the only event of a stream that has begun with 200, and the stream's end."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400, as vLLM answers a parameter it will not run with."""
    return ApiError(400, message, "BadRequestError", param)


def unknown_model(name: str, served: str) -> ApiError:
    """404 for a model this server does not serve."""
    return ApiError(404, f"The model `{name}` does not exist. Valid aliases: {served}.", "NotFoundError", "model")


def engine_busy() -> ApiError:
    """503, as an engine whose queue is full answers; a gateway should try another one."""
    return ApiError(503, BUSY_MESSAGE)


def prompt_too_long(max_model_tokens: int, prompt_tokens: str) -> ApiError:
    """400 for a prompt beyond the context. `prompt_tokens` is a count, or "at least" one."""
    return bad_request(
        f"This model's maximum context length is {max_model_tokens} tokens. However, your prompt contains "
        f"{prompt_tokens} input tokens, which exceeds this limit even without any output tokens. "
        "Please reduce the length of the input prompt.",
        "input_tokens",
    )
