"""The endpoints that generate, and where their requests have what matters."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import Dialect
from gateway.sse import Api


@dataclass(frozen=True, slots=True)
class Route:
    """One generating endpoint. `prompt_field` is where its prompt stands, `limit_fields` its token limits.

    `streams`: whether every answer is a stream, whatever the body says.
    """

    path: str
    api: Api
    dialect: Dialect
    prompt_field: str
    limit_fields: tuple[str, ...]
    streams: bool = False


ROUTES = (
    Route("/v1/chat/completions", Api.CHAT, Dialect.OPENAI, "messages", ("max_completion_tokens", "max_tokens")),
    Route("/v1/completions", Api.COMPLETIONS, Dialect.OPENAI, "prompt", ("max_tokens",)),
    Route("/v1/responses", Api.RESPONSES, Dialect.RESPONSES, "input", ("max_output_tokens",)),
    Route("/v1/messages", Api.MESSAGES, Dialect.ANTHROPIC, "messages", ("max_tokens",)),
    Route("/v1/embeddings", Api.EMBEDDINGS, Dialect.OPENAI, "input", ()),
    Route("/generate", Api.GENERATE, Dialect.TGI, "inputs", ("max_new_tokens",)),
    Route("/generate_stream", Api.GENERATE, Dialect.TGI, "inputs", ("max_new_tokens",), streams=True),
)
