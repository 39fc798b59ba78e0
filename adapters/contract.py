"""What the gateway needs of an engine: one capability record and a few verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from tiergate_engine.control import EngineState, Orders, Promise, StepFacts


class Failure(Enum):
    """What went wrong upstream, in the only terms the gateway acts on."""

    OVERLOADED = "overloaded"  # try another backend
    UNREACHABLE = "unreachable"  # could not connect, or the connection died before an answer
    TIMEOUT = "timeout"
    BROKEN = "broken"  # answered, but not in the protocol
    UNSUPPORTED = "unsupported"  # the engine lacks the route; another kind of engine may have it
    TOO_LONG = "too_long"  # rejected for its length: an engine that takes longer ones may serve it
    REJECTED = "rejected"  # the engine calls the request itself wrong (4xx): its answer goes to the client


_THE_CLIENTS = frozenset({Failure.REJECTED, Failure.TOO_LONG})


class UpstreamError(Exception):
    """Anything an engine did wrong, mapped here once. `status` is the engine's, if it gave one."""

    def __init__(self, failure: Failure, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.failure = failure
        self.status = status

    @property
    def retryable(self) -> bool:
        """Whether another backend may do better (before the client's first byte)."""
        return self.failure not in _THE_CLIENTS


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One HTTP exchange with an engine. `headers` are complete; `body` goes as it is."""

    method: str
    path: str  # begins with "/"
    headers: Mapping[str, str]
    body: bytes
    timeout_s: float | None = None  # to the response head; None waits for ever


class UpstreamResponse(Protocol):
    """An open answer. Not reading holds the engine back (its socket fills); nothing grows without bound."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case names."""
        ...

    async def read(self) -> bytes:
        """The body bytes that have arrived, as they came; b"" at the end. Raises UpstreamError when cut off."""
        ...

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError(BROKEN) beyond the limit."""
        ...

    def abort(self) -> None:
        """Close the connection now: the engine sees a disconnect. Idempotent."""
        ...

    def release(self) -> None:
        """The body was read to its end (or is not wanted): keep the connection if it can be kept. Idempotent."""
        ...


class Upstream(Protocol):
    """HTTP to one backend: the one way bytes reach an engine. Its inside may be replaced by a faster one."""

    async def open(self, call: UpstreamCall) -> UpstreamResponse:
        """Send the request and wait for the response head. Raises UpstreamError.

        A kept-alive connection that turns out closed before any byte of an answer is retried once on a new one.
        """
        ...

    async def close(self) -> None: ...


class Support(Enum):
    """What an engine can do for a verb."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend was found to be able to do. Probed, not assumed; None is unknown.

    ``tokens_per_event``: 1 when every content event carries exactly one token; None when events may carry more,
    so that counts come from usage. ``lease_tokens``: KV for so many tokens of an answer is taken as its request is
    let in, and when they are made it is queued again, behind all that wait; None when KV grows as it is needed.
    ``max_prompt_tokens``: the longest prompt, where that is less than ``max_model_tokens`` says. ``lingers``: a
    sequence goes on for a while after its client left, so it has to be aborted by its id as well. ``engines``:
    data-parallel ones behind the endpoint, each with a cache of its own. ``prefill_interval``: chunks of prompts
    have steps of their own, with so many steps of decodes between two of them, as it was started; None when they
    share steps with decodes.
    """

    engine: str  # "vllm", "sglang", "tgi", "openai"
    version: str | None = None
    emulated: bool = False  # the engine says it emulates
    models: tuple[str, ...] = ()
    max_model_tokens: int | None = None
    max_prompt_tokens: int | None = None
    kv_tokens: int | None = None
    block_tokens: int | None = None
    max_running_seqs: int | None = None
    max_batched_tokens: int | None = None
    priority: Support = Support.UNKNOWN
    tokenize: Support = Support.UNKNOWN
    abort_by_id: Support = Support.NO
    continuous_usage: Support = Support.UNKNOWN
    chunk_budget: Support = Support.NO
    running_cap: Support = Support.NO
    driven: Support = (
        Support.NO
    )  # takes orders (`Drivable`), and plans each step by what its requests were promised
    load: Support = Support.UNKNOWN
    tokens_per_event: int | None = 1
    lease_tokens: int | None = None
    lingers: bool = False
    prefix_caching: Support = Support.UNKNOWN
    engines: int | None = None
    prefill_interval: int | None = None

    def interval_with(self, chunk_tokens: int | None) -> int | None:
        """`prefill_interval` under a chunk budget, with which a step of decodes at least is behind each."""
        if self.prefill_interval is None or chunk_tokens is None:
            return self.prefill_interval
        return max(self.prefill_interval, 1)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine itself reports; late by nature, so a correction to our own count, never the source."""

    running: int | None = None
    waiting: int | None = None
    kv_used_fraction: float | None = None  # 0..1
    preemptions: int | None = None  # since start
    waiting_tokens: int | None = None  # prompt tokens in the queue that no cache holds
    age_s: float | None = None  # how old the engine says its own numbers are


@dataclass(frozen=True, slots=True)
class OutgoingRequest:
    """A client request about to be sent: what the adapter may still add in its engine's words.

    ``headers`` are the client's as they came; ``body`` is decompressed, whatever they say of its encoding.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes
    request_id: str
    streamed: bool
    left_ms: int | None = None  # until its first token is due, as it is sent; None: nothing was promised
    due_ms: int | None = None  # when that is, by the wall clock since 1970, for engines that order by any number
    want_usage: bool = False  # add a final usage event that the gateway will remove again
    promise: Promise | None = None  # what is promised to it, for engines that are driven by it


@dataclass(frozen=True, slots=True)
class DecodePace:
    """An engine's steps of decodes only, over some time: how many, and what they held and took in the mean."""

    steps: int
    seqs: float
    kv_tokens: float
    step_s: float


class Unsupported(Exception):
    """The engine has no such verb; the controller falls back."""


class Adapter(Protocol):
    """One engine endpoint in its family's words."""

    @property
    def upstream(self) -> Upstream: ...

    async def probe(self) -> Capabilities:
        """Ask the engine what it is. Raises UpstreamError when it does not answer."""
        ...

    async def healthy(self) -> bool:
        """A cheap liveness question; never a generation."""
        ...

    async def read_load(self) -> EngineLoad: ...

    def prepare(self, request: OutgoingRequest) -> UpstreamCall:
        """The exchange that carries the request: body bytes unchanged unless something had to be added.

        Raises UpstreamError(UNSUPPORTED) for a route that this family of engines does not have.
        """
        ...

    def stream_failure(self, first_event: bytes) -> UpstreamError | None:
        """Whether a stream's first event is really an error (an overload that came as 200)."""
        ...

    def response_failure(self, status: int, body: bytes) -> UpstreamError:
        """What an answer with an error status means."""
        ...

    async def abort(self, request_id: str) -> None:
        """Abort by id, where the engine can; disconnecting is the relay's job. Raises Unsupported."""
        ...

    async def count_tokens(self, body: Mapping[str, object]) -> int:
        """Exact prompt tokens of a request body (prompt or messages), by the engine. Raises Unsupported."""
        ...

    async def set_chunk_budget(self, tokens: int | None) -> None:
        """Most prompt tokens a step may carry from now on, on top of its decodes. Raises Unsupported."""
        ...

    async def set_running_cap(self, sequences: int | None) -> None:
        """Most sequences that may run from now on. Raises Unsupported."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class TellsPace(Protocol):
    """An engine that tells how long its steps take, without a plug-in."""

    async def read_decode_pace(self) -> DecodePace | None:
        """Since this was last asked; None the first time, and where nothing is told. Raises UpstreamError."""
        ...


@runtime_checkable
class Drivable(Protocol):
    """An engine with Tiergate's plug-in. All raise Unsupported when it is not there, and UpstreamError."""

    async def give_orders(self, orders: Orders) -> EngineState:
        """What the engine does from its next step on, in place of all it was told before."""
        ...

    async def read_state(self) -> EngineState: ...

    async def read_steps(self, since: int) -> StepFacts:
        """The engine's steps from number `since` on, as far as it still knows them."""
        ...


@dataclass(frozen=True, slots=True)
class PromptIds:
    """A request's prompt as the engine's token ids.

    ``keyed`` are the members of its body that the engine's prefix cache is keyed by besides.
    """

    ids: tuple[int, ...]
    keyed: Mapping[str, object]


@runtime_checkable
class ComputesAhead(Protocol):
    """An engine that can be had to compute the beginning of a prompt into its prefix cache."""

    async def prompt_ids(self, path: str, body: bytes) -> PromptIds:
        """A request's prompt in token ids, as the engine itself will see it.

        Raises Unsupported when the prompt cannot be told so, or its request would not read the cache;
        UpstreamError when the engine does not answer or refuses it.
        """
        ...

    async def compute_ahead(self, prompt: PromptIds, tokens: int, like: OutgoingRequest) -> None:
        """Have the first `tokens` of the prompt computed, with the urgency and the rights of the request `like`.

        Returns when they are cached; cancelled, it leaves nothing behind on the engine. Raises UpstreamError.
        """
        ...
