"""Request bodies: what vLLM accepts, in the fields that an emulation can honour.

A field that would change the answer in a way nothing here can emulate (log-probabilities, echo, images) is
refused by name. Sampling parameters, `stop` strings, tools and response formats are accepted and have no
effect: the text means nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.emulated.errors import ApiError, bad_request

_REPORTED_ERRORS = 10
_INPUT_CHARS = 200

JsonValue = object
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class FieldError(ValueError):
    """A rule across fields is broken; `parameter` is the field to name."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Body(BaseModel):
    """A request body; fields that are not named are taken and ignored, as in vLLM."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Body):
    """`stream_options` of the OpenAI API, with vLLM's running usage."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationBody(Body):
    """What chats and completions have in common."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: Int64 | None = None
    temperature: float | None = None
    priority: Int64 = 0
    request_id: str | None = None
    vllm_xargs: dict[str, JsonValue] | None = None
    logprobs: JsonValue = None
    prompt_logprobs: JsonValue = None
    echo: bool | None = False
    use_beam_search: bool | None = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise FieldError("Stream options can only be defined when `stream=True`.", "stream_options")
        return self

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(Body):
    """A part of a message's content; only text has a meaning here."""

    type: str
    text: str = ""


class Message(Body):
    """A chat message: any role; content as text, as parts, or none."""

    role: str
    content: str | list[TextPart | str] | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. The prompt is a text, several, token ids, or several lists of them."""

    prompt: list[int] | list[list[int]] | str | list[str] | None = None
    max_tokens: int | None = 16

    @model_validator(mode="after")
    def _some_prompt(self) -> CompletionBody:
        if self.prompt is None or self.prompt == "":
            raise FieldError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        return self


class EmbeddingBody(Body):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: list[int] | list[list[int]] | str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("Either prompt or messages must be provided.", "prompt")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**63 - 1)]]


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(kind: type[BodyT], raw: bytes) -> BodyT:
    """The body as `kind`. Raises ApiError 400 in vLLM's words."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400,
            "1 validation error:\n  "
            + str({"type": "json_invalid", "loc": f"body.{error.pos}", "msg": "JSON decode error", "input": {}}),
            param=f"body.{error.pos}",
        ) from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from error


def check_generation(body: GenerationBody) -> None:
    """Limits vLLM sets on sampling parameters. Raises ApiError 400."""
    for name, asked in (
        ("logprobs", body.logprobs),
        ("prompt_logprobs", body.prompt_logprobs),
        ("echo", body.echo),
        ("use_beam_search", body.use_beam_search),
    ):
        if asked not in (None, False):
            raise bad_request(f"`{name}` is not available: this is an emulated engine without a model.", name)
    if body.choices < 1:
        raise bad_request(f"n must be at least 1, got {body.n}.", "n")
    if body.temperature is not None and not body.temperature >= 0.0:
        raise bad_request(f"temperature must be non-negative, got {body.temperature}.", "temperature")
    if body.max_tokens is not None and body.max_tokens < 1:
        raise bad_request(f"max_tokens must be at least 1, got {body.max_tokens}.", "max_tokens")
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None and body.max_completion_tokens < 1:
        asked_tokens = body.max_completion_tokens
        raise bad_request(f"max_tokens must be at least 1, got {asked_tokens}.", "max_completion_tokens")
    if body.min_tokens < 0:
        message = f"min_tokens must be greater than or equal to 0, got {body.min_tokens}."
        raise bad_request(message, "min_tokens")


def stated_output_tokens(body: GenerationBody) -> int | None:
    """The extension `vllm_xargs.emulated_output_tokens`: the exact length a replayed trace wants, or None.

    It travels where a gateway does not look, so that `max_tokens` can stay what a client would really say.
    """
    stated = (body.vllm_xargs or {}).get("emulated_output_tokens")
    if stated is None:
        return None
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise bad_request(
            f"vllm_xargs.emulated_output_tokens must be an integer of at least 1, got {stated!r}.",
            "vllm_xargs.emulated_output_tokens",
        )
    return stated


def _invalid(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False)
    param: str | None = None
    lines: list[str] = []
    for detail in details:
        location = ".".join(("body", *map(str, detail["loc"])))
        cause = detail.get("ctx", {}).get("error")
        if param is None and isinstance(cause, FieldError):
            param = cause.parameter
        shown = {"type": detail["type"], "loc": location, "msg": detail["msg"], "input": _short(detail["input"])}
        lines.append(f"  {shown}")
    if param is None:
        param = ".".join(("body", *map(str, details[0]["loc"])))
    label = "error" if len(lines) == 1 else "errors"
    message = f"{len(lines)} validation {label}:\n" + "\n".join(lines[:_REPORTED_ERRORS])
    if len(lines) > _REPORTED_ERRORS:
        message += f"\n  ...and {len(lines) - _REPORTED_ERRORS} more {label}"
    return ApiError(400, message, param=param)


def _short(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _INPUT_CHARS else text[:_INPUT_CHARS] + "...[truncated]"
