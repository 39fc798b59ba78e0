"""Where a load goes, and in which words: route, prompts, and how the engine learns an answer's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import orjson

from loadgen.prompts import TokenIdPrompts, WordPrompts
from workloads.plan import PlannedRequest


class Route(Enum):
    """The OpenAI route a load uses."""

    CHAT = "chat"
    COMPLETIONS = "completions"

    @property
    def path(self) -> str:
        return "/chat/completions" if self is Route.CHAT else "/completions"


class Lengths(Enum):
    """How the engine is told how long an answer will be."""

    EMULATED = "emulated"  # the emulated engine's own argument, which a gateway does not read
    EXACT = "exact"  # max_tokens and ignore_eos: a real engine stops exactly there, and the gateway sees it
    LIMIT = "limit"  # max_tokens only: any OpenAI server; answers may be shorter


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI, and how to ask it.

    Attributes:
        base_url: up to and including ``/v1``.
        prompts: what writes the prompts; token ids go with the completions route only.
        max_tokens: sent with `Lengths.EMULATED` instead of the true length; None sends none (chat) or 2048
            (completions, where engines stop at 16 without it).
        template_tokens: what the server's chat template adds to a prompt (1 for the emulated engine).
        tier_header: name of the header that carries the tier; None sends none.
    """

    base_url: str
    model: str
    prompts: WordPrompts | TokenIdPrompts
    route: Route = Route.CHAT
    lengths: Lengths = Lengths.EXACT
    max_tokens: int | None = None
    template_tokens: int = 0
    tier_header: str | None = "x-slo-tier"
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the base URL must begin with http:// or https://, not {self.base_url!r}")
        if isinstance(self.prompts, TokenIdPrompts) and self.route is not Route.COMPLETIONS:
            raise ValueError("prompts of token ids need the completions route")
        for name, value in (("API key", self.api_key or ""), *self.headers.items()):
            if not value.isascii() or (value and not value.isprintable()):
                raise ValueError(f"{name} cannot be sent in a header: use plain ASCII")

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + self.route.path

    def headers_of(self, request: PlannedRequest) -> dict[str, str]:
        headers = {"Content-Type": "application/json", **self.headers}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if self.tier_header is not None:
            headers[self.tier_header] = request.tier
        return headers

    def body_of(self, request: PlannedRequest) -> bytes:
        """The request body, written when it is sent: a load of long prompts does not lie in memory."""
        body: dict[str, object] = {"model": self.model}
        prompts = self.prompts
        prompt: str | Sequence[int]
        if isinstance(prompts, WordPrompts):
            prompt = prompts.text(request, self.template_tokens if self.route is Route.CHAT else 0)
        else:
            prompt = prompts.ids(request)
        if self.route is Route.CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if request.streamed:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        self._add_length(body, request)
        return orjson.dumps(body)

    def _add_length(self, body: dict[str, object], request: PlannedRequest) -> None:
        if self.lengths is not Lengths.EMULATED:
            body["max_tokens"] = request.output_tokens
            if self.lengths is Lengths.EXACT:
                body["ignore_eos"] = True
            return
        body["vllm_xargs"] = {"emulated_output_tokens": request.output_tokens}
        if self.max_tokens is not None:
            body["max_tokens"] = max(self.max_tokens, request.output_tokens)
        elif self.route is Route.COMPLETIONS:
            body["max_tokens"] = max(_COMPLETIONS_MAX_TOKENS, request.output_tokens)


_COMPLETIONS_MAX_TOKENS = 2048
