"""Hugging Face's Text Generation Inference over its OpenAI routes: a backend whose budgets are set at launch.

What is told here of TGI was read in the source of version 3.3.7 (in maintenance mode since December 2025), not
tried on a live server. It has no route to change a budget or to abort, and no priority, so there is nothing to
drive it by but what is let in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import orjson

from adapters.contract import (
    Capabilities,
    EngineLoad,
    Failure,
    OutgoingRequest,
    Support,
    Unsupported,
    Upstream,
    UpstreamCall,
    UpstreamError,
)
from adapters.errors import error_in_event, rejection
from adapters.exchange import Answer
from adapters.exposition import Scanner, total
from adapters.minted import MintedIds
from adapters.monitored import MonitoredAdapter, positive_int

_RUNNING = "tgi_batch_current_size"
_WAITING = "tgi_queue_size"
_KV_RESERVED = "tgi_batch_current_max_tokens"
_KV_CAPACITY = "tgi_batch_max_total_tokens"
_LOAD = Scanner((_RUNNING, _WAITING, _KV_RESERVED))
_STATIC = Scanner((_RUNNING, _WAITING, _KV_CAPACITY))

_LEASE_TOKENS = 1024  # a constant of its router since 3.0
_CHAT = "/v1/chat/completions"
_OWN = frozenset({"/generate", "/generate_stream"})  # its own, whose bodies pass as they are


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What one of TGI's errors is. `status` is the one it has outside of streams."""

    failure: Failure
    status: int


_OVERLOADED = _Meaning(Failure.OVERLOADED, 429)
_INVALID = _Meaning(Failure.REJECTED, 422)
_FAILED = _Meaning(Failure.BROKEN, 424)
_INCOMPLETE = _Meaning(Failure.BROKEN, 500)
_BY_TYPE = {
    "overloaded": _OVERLOADED,
    "validation": _INVALID,
    "template_error": _INVALID,
    "missing_template_variable": _INVALID,
    "tool_error": _INVALID,
    "suffix not supported": _INVALID,
    "batch size exceeded": _INVALID,
    "generation": _FAILED,
    "incomplete_generation": _INCOMPLETE,
    "incomplete_generation_stream": _INCOMPLETE,
    "stream_serialization_error": _INCOMPLETE,
    "healthcheck": _Meaning(Failure.UNREACHABLE, 503),
}
# In a stream of the OpenAI routes every error says 422 and no type, so only its words tell what it is.
_BY_WORDS = (
    ("Model is overloaded", _OVERLOADED),
    ("Input validation error", _INVALID),
    ("Template error", _INVALID),
    ("Missing template va", _INVALID),  # what follows is spelled "tiable"
    ("Tool error", _INVALID),
    ("Request failed during generation", _FAILED),
    ("Incomplete generation", _INCOMPLETE),
    ("Stream event serialization error", _INCOMPLETE),
)


class TgiAdapter(MonitoredAdapter):
    """One TGI server.

    Its budgets are static: the most tokens of a step (``--max-batch-prefill-tokens``) and the KV capacity are told
    by no route of version 3, so they belong into the backend's configured limits. An older server that tells them
    in /info is believed.

    A stream always begins with 200; an overload is its first event. The `id` that it leaves empty is filled in
    (`adapters.minted`). After a failed generation its /health tries one token of its own.

    After every 1024 tokens of an answer it queues the request again, behind all that wait, with the answer so far
    as part of the prompt; and one that leaves while its prompt is computed costs all of the prompt's steps.
    """

    family = "TGI"
    absent = frozenset({"/v1/responses", "/v1/messages", "/v1/embeddings"})

    def __init__(self, upstream: Upstream, *, api_key: str | None = None, probe_timeout_s: float = 10.0) -> None:
        super().__init__(MintedIds(upstream), api_key=api_key, probe_timeout_s=probe_timeout_s)
        self._tokenize = Support.UNKNOWN
        self._kv_tokens: int | None = None

    async def probe(self) -> Capabilities:
        """Ask /info, the models and the metrics; nothing is generated.

        Raises UpstreamError when the server does not answer, wants another API key, or is not TGI.
        """
        answer = await self._ask("GET", "/info")
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)
        info = answer.json_object()
        if not is_tgi(info):
            raise UpstreamError(Failure.BROKEN, "the server's /info is not that of TGI", answer.status)
        models = await self._ask_models()
        samples = await self._try_samples(_STATIC)
        self._kv_tokens = positive_int(info.get("max_batch_total_tokens")) or total(samples, _KV_CAPACITY)
        self._tokenize = await self._has_post_route("/tokenize")
        version = info.get("version")
        return Capabilities(
            engine="tgi",
            version=version if isinstance(version, str) else None,
            emulated=models.emulated,
            models=models.names or (str(info["model_id"]),),
            max_model_tokens=positive_int(info.get("max_total_tokens")),
            max_prompt_tokens=positive_int(info.get("max_input_tokens", info.get("max_input_length"))),
            kv_tokens=self._kv_tokens,
            # Beyond this many at once, waiting ones included, it refuses; it has no other cap on sequences.
            max_running_seqs=positive_int(info.get("max_concurrent_requests")),
            max_batched_tokens=positive_int(info.get("max_batch_prefill_tokens")),
            priority=Support.NO,
            tokenize=self._tokenize,
            continuous_usage=Support.NO,
            # A gauge is not there before it was first set; TGI's other backends never set them.
            load=Support.YES if any(one.name in (_RUNNING, _WAITING) for one in samples) else Support.UNKNOWN,
            # Tokens that speculation brings together are still an event each.
            tokens_per_event=1,
            lease_tokens=_LEASE_TOKENS if _is_chunking(version) else None,
        )

    async def read_load(self) -> EngineLoad:
        """From /metrics; a gauge is unknown until the server first set it. Raises UpstreamError.

        What of the KV cache is used is what running requests have reserved. Shared prefixes count once for each,
        so the fraction is cut at 1.
        """
        samples = await self._samples(_LOAD)
        reserved = total(samples, _KV_RESERVED)
        return EngineLoad(
            running=total(samples, _RUNNING),
            waiting=total(samples, _WAITING),
            kv_used_fraction=(
                None if reserved is None or self._kv_tokens is None else min(reserved / self._kv_tokens, 1.0)
            ),
        )

    def prepare(self, request: OutgoingRequest) -> UpstreamCall:
        """As OpenAI, without what TGI refuses though it means nothing: `top_p` of 1, and a `stop` that is no list.

        Completions carry their usage unasked, so only a chat is asked for it. Raises UpstreamError(UNSUPPORTED)
        for a generating route that TGI does not have. Its own routes' bodies are left alone.
        """
        if request.path in _OWN:
            return super().prepare(request)
        want_usage = request.want_usage and request.path == _CHAT
        return super().prepare(replace(request, body=_readable(request.body), want_usage=want_usage))

    def stream_failure(self, first_event: bytes) -> UpstreamError | None:
        """The error that a stream's first event carries, by its words: all of them come as status 422."""
        found = error_in_event(first_event)
        if found is None:
            return None
        words = str(found)
        meaning = next((one for begin, one in _BY_WORDS if words.startswith(begin)), _INCOMPLETE)
        return _meant(meaning, words, meaning.status)

    def response_failure(self, status: int, body: bytes) -> UpstreamError:
        """What an answer with an error status means: by its `error_type`, else by the status."""
        found = super().response_failure(status, body)
        kind = Answer(status, body=body).json_object().get("error_type")
        meaning = _BY_TYPE.get(kind) if isinstance(kind, str) else None
        return found if meaning is None else _meant(meaning, str(found), status)

    async def abort(self, request_id: str) -> None:
        """Never by id. A closed connection ends a sequence at its next token, one in prefill only after it."""
        raise Unsupported("abort by id: closing the connection is all that TGI knows")

    async def set_chunk_budget(self, tokens: int | None) -> None:
        raise Unsupported("chunk budget: TGI takes --max-batch-prefill-tokens at launch only")

    async def set_running_cap(self, sequences: int | None) -> None:
        raise Unsupported("running cap: TGI takes --max-concurrent-requests at launch only")

    async def count_tokens(self, body: Mapping[str, object]) -> int:
        """Prompt tokens of a chat by /chat_tokenize, of a text by /tokenize.

        Raises Unsupported for a list of several texts, for token ids (TGI takes texts only), for too deep nesting,
        or a server without a tokenizer; UpstreamError when the engine refuses the prompt.
        """
        path, question = _tokenize_question(body)
        answer = await self._ask_tokenizer(path, question, self._tokenize)
        try:
            tokens = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            tokens = None
        if isinstance(tokens, dict):
            tokens = tokens.get("tokenize_response")
        if not isinstance(tokens, list):
            raise Unsupported(f"count tokens: {path} answered without a list of tokens")
        return len(tokens)


def _meant(meaning: _Meaning, words: str, status: int) -> UpstreamError:
    failure = meaning.failure
    return UpstreamError(rejection(words) if failure is Failure.REJECTED else failure, words, status)


def is_tgi(info: Mapping[str, object]) -> bool:
    """Whether an answer of /info is TGI's. Its sister for embeddings has the route too, but no such limits."""
    limits = ("max_total_tokens", "max_concurrent_requests", "max_best_of")
    return isinstance(info.get("model_id"), str) and all(positive_int(info.get(name)) for name in limits)


def _is_chunking(version: object) -> bool:
    """Whether it is of version 3 or later, which chunk prompts and lend KV blocks for so many tokens at a time."""
    major = version.partition(".")[0] if isinstance(version, str) else ""
    return major.isdecimal() and int(major) >= 3


def _readable(body: bytes) -> bytes:
    """A body with `top_p` of 1 or a `stop` that is a text, in TGI's words; any other comes back as it is."""
    if b'"top_p"' not in body and b'"stop"' not in body:
        return body
    try:
        # By the standard library: orjson makes floats of whole numbers beyond 64 bits.
        parsed = json.loads(body)
        if not isinstance(parsed, dict):
            return body
        written = dict(parsed)
        if written.get("top_p") == 1:
            del written["top_p"]
        if isinstance(written.get("stop"), str):
            written["stop"] = [written["stop"]]
        if written == parsed:
            return body
        return json.dumps(written, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return body


def _tokenize_question(body: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The route to ask, and what. Raises Unsupported."""
    if "messages" in body:
        names = ("model", "messages", "tools", "tool_choice", "tool_prompt", "response_format")
        return "/chat_tokenize", {name: body[name] for name in names if body.get(name) is not None}
    prompt = body.get("inputs", body.get("prompt"))
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return "/tokenize", {"inputs": prompt}
    raise Unsupported("count tokens: the body has neither messages nor one text")
