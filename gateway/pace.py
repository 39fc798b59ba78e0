"""How fast the backends go, read off the streams: progress for the core, step times for the learners.

Tokens are only counted when they come; everything here happens at the ticker's looks, or once a request.

A sample of decode step times needs a window in which nothing else happened: at least a quarter of a second with
the same streams and no prefill. Over so many steps the jitter of single reads averages out. Where events lately
carried more than one token, as told by the engine's usage, counts are scaled by it; where they carried many more,
no step is learned.

Other replicas' sequences are in those steps too: they are counted in a sample, and their prompts spoil it like
one's own. Of both one hears late, so a sample waits until what happened meanwhile must have been told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.ticket import Stage, Ticket
from scheduling.events import Progress, Progressed
from scheduling.load import LoadVector
from scheduling.predict import TOLD_WITHIN_S

_WINDOW_S = 0.25
_WINDOW_TOKENS = 4  # of a stream, at least
_SETTLE_S = 2 * TOLD_WITHIN_S  # what a replica did is told by then
_MERGED_WEIGHT = 0.2  # of the latest stream in a backend's tokens per event
_MERGED_MOST = 1.25  # beyond this many tokens an event, event times say too little of steps to learn from


@dataclass(frozen=True, slots=True)
class StepSample:
    """One backend's decode steps over a window: `steps` of them took `step_s` each in the median stream."""

    backend: str
    step_s: float
    decode_seqs: int
    decode_kv_tokens: int
    steps: int = 1


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """How long one prompt took to its first token, beside decodes only."""

    backend: str
    seconds: float
    prompt_tokens: int
    decode_seqs: int
    decode_kv_tokens: int


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A sample that holds if other replicas did nothing between `since_s` and `ready_s`."""

    sample: StepSample | PrefillSample
    since_s: float
    ready_s: float


class Learner(Protocol):
    """Whoever wants to know how long steps took."""

    def learn_step(self, sample: StepSample) -> None: ...

    def learn_prefill(self, sample: PrefillSample) -> None: ...


@dataclass(slots=True)
class _Backend:
    """What is remembered of one backend. `since` is each stream's (tokens, time) at the window's start.

    `others` is what the other replicas carry there, as told last; `others_s` when a prompt of theirs was last
    seen, queued or as a sequence more; minus infinity while there never was any.
    """

    opening: int = 0
    opened: int = 0
    decode_seqs: int = 0
    decode_kv_tokens: int = 0
    window_opened: int = 0
    window_s: float = 0.0
    since: dict[str, tuple[int, float]] = field(default_factory=dict)
    tokens_per_event: float = 1.0
    others: LoadVector = field(default_factory=LoadVector)
    others_s: float = -math.inf
    unsettled: list[_Unsettled] = field(default_factory=list)

    def tokens(self, ticket: Ticket) -> int:
        """The ticket's output so far; one that is known to be merged was estimated already."""
        return ticket.output_tokens if ticket.merged else int(ticket.output_tokens * self.tokens_per_event)


class Pace:
    """Follows every backend's openings and streams."""

    def __init__(self) -> None:
        self.learner: Learner | None = None
        self._backends: dict[str, _Backend] = {}

    def opening(self, ticket: Ticket) -> None:
        """The ticket's stream is about to be opened."""
        backend = self._of(ticket)
        backend.opening += 1
        backend.opened += 1
        # Only a prompt that is prefilled alone tells how long prefill takes.
        ticket.alone_at = backend.opened if backend.opening == 1 else None

    def opened(self, ticket: Ticket) -> None:
        """The ticket's opening is over, one way or the other."""
        self._of(ticket).opening -= 1

    def told(self, ticket: Ticket, tokens_per_event: float) -> None:
        """A stream ended whose engine said how many tokens its events carried."""
        backend = self._of(ticket)
        latest = max(tokens_per_event, 1.0)
        backend.tokens_per_event += (latest - backend.tokens_per_event) * _MERGED_WEIGHT

    def others(self, backend: str, load: LoadVector, now_s: float) -> None:
        """What all other replicas carry on a backend was told."""
        known = self._named(backend)
        before, known.others = known.others, load
        if load.decodes > before.decodes or before.queued_prefill_tokens or load.queued_prefill_tokens:
            known.others_s = now_s

    @property
    def openings(self) -> int:
        """Streams that are being opened, on all backends."""
        return sum(backend.opening for backend in self._backends.values())

    def first_token(self, ticket: Ticket) -> None:
        """Its first token came: learn, if it was prefilled alone."""
        backend = self._of(ticket)
        request = ticket.request
        if ticket.alone_at != backend.opened or not request.streamed or self.learner is None:
            return
        assert ticket.backend is not None
        tokens = (request.prompt_tokens - request.cached_tokens) * request.sequences
        others = backend.others
        sample = PrefillSample(
            ticket.backend,
            ticket.last_bytes_s - ticket.opened_s,
            tokens,
            backend.decode_seqs + others.decodes,
            backend.decode_kv_tokens + others.peak_kv_tokens,
        )
        self._learn(backend, sample, ticket.opened_s, ticket.last_bytes_s)

    def look(self, tickets: Iterable[Ticket], now_s: float) -> list[Progressed]:
        """Where the streams of each backend are, by name; a backend where nothing moved is left out."""
        by_backend: dict[str, list[Ticket]] = {}
        for ticket in tickets:
            if ticket.backend is not None:
                by_backend.setdefault(ticket.backend, []).append(ticket)
        for name, backend in self._backends.items():
            if name not in by_backend:
                backend.decode_seqs = backend.decode_kv_tokens = 0
                backend.since = {}
            if backend.others.queued_prefill_tokens:
                backend.others_s = now_s
            self._settle(backend, now_s)
        progressed = [self._progress(name, some, now_s) for name, some in sorted(by_backend.items())]
        return [event for event in progressed if event is not None]

    def _of(self, ticket: Ticket) -> _Backend:
        assert ticket.backend is not None
        return self._named(ticket.backend)

    def _named(self, name: str) -> _Backend:
        backend = self._backends.get(name)
        if backend is None:
            backend = self._backends[name] = _Backend()
        return backend

    def _progress(self, name: str, tickets: list[Ticket], now_s: float) -> Progressed | None:
        backend = self._of(tickets[0])
        moved: list[Progress] = []
        gaps: list[float] = []
        streams: list[Ticket] = []
        seqs = kv_tokens = 0
        latest_s = 0.0
        for ticket in tickets:
            if ticket.stage is not Stage.RUNNING or ticket.lease_id is None:
                continue
            streams.append(ticket)
            tokens = backend.tokens(ticket)
            sequences = ticket.request.sequences
            seqs += sequences
            kv_tokens += ticket.request.prompt_tokens * sequences + tokens
            latest_s = max(latest_s, ticket.last_token_s)
            new = tokens - ticket.seen_tokens
            if new <= 0:
                continue
            moved.append(Progress(ticket.lease_id, tokens // sequences))
            if ticket.seen_s and ticket.last_token_s > ticket.seen_s:
                gaps.append((ticket.last_token_s - ticket.seen_s) * sequences / new)
            ticket.seen_tokens = tokens
            ticket.seen_s = ticket.last_token_s
        backend.decode_seqs, backend.decode_kv_tokens = seqs, kv_tokens
        self._sample(name, backend, streams, now_s, undisturbed=len(streams) == len(tickets))
        if not moved:
            return None
        step_s = statistics.median(gaps) if gaps else None
        return Progressed(name, tuple(moved), step_s, max(0.0, now_s - latest_s) if latest_s else None)

    def _sample(
        self, name: str, backend: _Backend, streams: list[Ticket], now_s: float, *, undisturbed: bool
    ) -> None:
        """Learn from the window if it was long and clean; begin another when it is used up or spoilt."""
        since = backend.since
        clean = (
            undisturbed
            and backend.tokens_per_event <= _MERGED_MOST
            and not any(ticket.merged for ticket in streams)
            and backend.opened == backend.window_opened
            and backend.others_s < backend.window_s
            and len(since) == len(streams) > 0
            and all(ticket.request.request_id in since for ticket in streams)
        )
        if clean and now_s - backend.window_s < _WINDOW_S:
            return
        if clean and self.learner is not None:
            gaps: list[float] = []
            steps: list[int] = []
            for ticket in streams:
                tokens, time_s = since[ticket.request.request_id]
                events = (ticket.output_tokens - tokens) / ticket.request.sequences
                new = events * backend.tokens_per_event
                if new >= _WINDOW_TOKENS and time_s:
                    gaps.append((ticket.last_token_s - time_s) / new)
                    steps.append(round(new))
            if gaps:
                sample = StepSample(
                    name,
                    statistics.median(gaps),
                    backend.decode_seqs + backend.others.decodes,
                    backend.decode_kv_tokens + backend.others.peak_kv_tokens,
                    round(statistics.median(steps)),
                )
                self._learn(backend, sample, backend.window_s, now_s)
        backend.window_s = now_s
        backend.window_opened = backend.opened if undisturbed else -1
        backend.since = {
            ticket.request.request_id: (ticket.output_tokens, ticket.last_token_s) for ticket in streams
        }

    def _learn(self, backend: _Backend, sample: StepSample | PrefillSample, since_s: float, now_s: float) -> None:
        """Learn from a sample that began at `since_s`: at once where there are no other replicas."""
        alone = backend.others_s == -math.inf
        backend.unsettled.append(_Unsettled(sample, since_s, now_s if alone else now_s + _SETTLE_S))
        self._settle(backend, now_s)

    def _settle(self, backend: _Backend, now_s: float) -> None:
        """Learn from the samples that others can no longer spoil, and drop those that they did."""
        left: list[_Unsettled] = []
        for one in backend.unsettled:
            if backend.others_s >= one.since_s:
                continue
            if now_s < one.ready_s:
                left.append(one)
            elif self.learner is not None:
                match one.sample:
                    case StepSample():
                        self.learner.learn_step(one.sample)
                    case PrefillSample():
                        self.learner.learn_prefill(one.sample)
        backend.unsettled = left
