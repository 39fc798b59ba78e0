"""Who is on one backend, and what follows from it for a newcomer.

A `Ledger` is the only mutable view of a backend in the core. It is brought up to date by events (placed, first
token, progress, ended), so that a decision reads sums and short arrays instead of walking residents:

* `seqs`, `kv_tokens`, `queued_prefill_tokens`: sums over residents, here and on other replicas;
* the **growth curve**: how KV rises and falls until the last resident has ended, so the peak with a newcomer
  costs a search and a maximum (PolyServe §4.5 simulates future iterations for the same number);
* the **slack floor**: per pace, the least time any resident has left until its next token is due, and from it the
  longest first chunk of a prompt that makes nobody late.

A resident whose token is late already has lost its promise: it is served on, but holds nobody back.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate
from operator import add, attrgetter

from scheduling.backends import Backend
from scheduling.lengths import LengthModel
from scheduling.load import Cost, LoadVector
from scheduling.requests import Request
from tiergate_engine.step import Step

SLACK_RESERVE = 1.0
"""Paces of slack that no placement may plan to spend."""

DEFAULT_CHUNK_TOKENS = 2048
"""Token budget of a step when neither probe nor configuration says one (vLLM's own default online)."""

_MOST_CHUNK_TOKENS = 65_536  # where an engine's token budget is not known
_BY_REMAINING = attrgetter("remaining_tokens")
_NOTHING = LoadVector()

PREFILL_MEMORY_S = 10.0
"""Time constant of the mean rate at which prompts come to a backend."""


class Resident:
    """One request on a backend, from the moment its place was asked for until its lease ends."""

    __slots__ = (
        "cost",
        "due_s",
        "expected_first_s",
        "first_token",
        "generated_tokens",
        "guest",
        "kv_tokens",
        "lease_id",
        "lengths",
        "lost",
        "placed_s",
        "prefill_tokens",
        "remaining_tokens",
        "request",
        "seen_s",
        "sequences",
        "tpot_s",
    )

    def __init__(
        self, lease_id: str, request: Request, cost: Cost, lengths: LengthModel, placed_s: float, *, guest: bool
    ) -> None:
        self.lease_id = lease_id
        self.request = request
        self.cost = cost
        self.lengths = lengths
        self.placed_s = placed_s
        self.seen_s = placed_s
        self.guest = guest
        self.first_token = False
        self.lost = False
        self.generated_tokens = 0
        self.expected_first_s = math.inf
        self.prefill_tokens = cost.prefill_tokens
        self.tpot_s = math.inf if request.slo.tpot_s is None else request.slo.tpot_s
        self.kv_tokens = request.prompt_tokens * request.sequences
        self.remaining_tokens = expected_output_tokens(request, lengths)
        self.sequences = request.sequences
        self.due_s = request.slo.deadline_s(request.arrival_s, 0)  # of its next token

    def advance(self, generated_tokens: int, seen_s: float) -> None:
        """Its streams were at `generated_tokens` (per sequence) at `seen_s`."""
        request = self.request
        self.seen_s = seen_s
        self.generated_tokens = generated_tokens
        self.kv_tokens = (request.prompt_tokens + generated_tokens) * request.sequences
        self.remaining_tokens = expected_output_tokens(request, self.lengths, generated_tokens)
        self.due_s = request.slo.deadline_s(request.arrival_s, generated_tokens)


def expected_output_tokens(request: Request, lengths: LengthModel, generated_tokens: int = 0) -> float:
    """Tokens still to come: the client's hint, else what was learned; never beyond `max_output_tokens`."""
    hint = request.expected_output_tokens
    if hint is not None and hint > generated_tokens:
        expected = float(hint - generated_tokens)
    else:
        expected = lengths.remaining(generated_tokens)
    if request.max_output_tokens is not None:
        expected = min(expected, request.max_output_tokens - generated_tokens)
    return max(expected, 1.0)


class Ledger:
    """One backend with its residents. `tier` is its membership (None: the pool)."""

    __slots__ = (
        "_newcomer",
        "_peaks",
        "_peaks_and_steps",
        "_remaining",
        "_suffix_kv",
        "_suffix_seqs",
        "alone_s",
        "backend",
        "blocked_until_s",
        "chunk_room_tokens",
        "chunk_step_s",
        "claiming_for",
        "decode_kv_tokens",
        "decode_step_s",
        "decodes",
        "empty_checks",
        "epoch",
        "failures",
        "floor_s",
        "foreign",
        "kv_tokens",
        "last_step_s",
        "load",
        "peak_after_tokens",
        "peak_kv_tokens",
        "prefill_since_s",
        "prefill_work",
        "prefill_work_s",
        "queued",
        "queued_prefill_tokens",
        "queued_slack_floor",
        "residents",
        "seqs",
        "slack_floor",
        "step_s",
        "stored_decodes",
        "stored_kv_tokens",
        "stored_prefill_tokens",
        "tier",
        "tightest_tpot_s",
    )

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.alone_s = backend.step_time.decode_seconds(1, 0)  # the shortest step it can make
        self.tier: str | None = None
        self.epoch = 0
        self.claiming_for: str | None = None
        self.residents: dict[str, Resident] = {}
        self.foreign = _NOTHING
        self.failures = 0
        self.blocked_until_s = -math.inf
        self.empty_checks = 0
        self.step_s: float | None = None
        self.last_step_s: float | None = None
        self.prefill_since_s = -math.inf
        self.prefill_work = 0.0
        self.prefill_work_s = 0.0
        self.stored_decodes = self.stored_kv_tokens = self.stored_prefill_tokens = 0
        self.load = 0.0
        self._clear_sums()

    def _clear_sums(self) -> None:
        self.seqs = self.foreign.decodes
        self.decodes = self.foreign.decodes
        self.queued = 0
        self.kv_tokens = self.decode_kv_tokens = self.peak_kv_tokens = self.foreign.peak_kv_tokens
        self.queued_prefill_tokens = self.foreign.queued_prefill_tokens
        self.tightest_tpot_s = math.inf
        self.slack_floor: tuple[tuple[float, float], ...] = ()
        self.queued_slack_floor: tuple[tuple[float, float], ...] = ()
        self._newcomer: Resident | None = None
        self._remaining: list[float] = []
        self._suffix_kv: list[float] = [float(self.kv_tokens)]
        self._suffix_seqs: list[int] = [0]
        self._peaks: list[float] = []
        self._peaks_and_steps: list[float] = []
        self.peak_after_tokens = 0.0
        self.chunk_room_tokens = math.inf
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, self.peak_kv_tokens)
        self._time_steps()

    def renew(self, backend: Backend, now_s: float) -> None:
        """Something about the backend is new: its profile, its limits, its state."""
        self.backend = backend
        self.alone_s = backend.step_time.decode_seconds(1, 0)
        self.refresh(now_s)

    # --- events --------------------------------------------------------------------------------------------

    def place(self, resident: Resident, now_s: float) -> None:
        if not self.queued:
            self.prefill_since_s = now_s
        self.prefill_work = self._decayed_work(now_s) + resident.cost.prefill_tokens
        self.prefill_work_s = now_s
        first = not self.residents
        self.residents[resident.lease_id] = resident
        self.stored_decodes += resident.cost.decodes
        self.stored_kv_tokens += resident.cost.peak_kv_tokens
        self.stored_prefill_tokens += resident.cost.prefill_tokens
        if first:
            self.refresh(now_s)
        else:
            self._add(resident, now_s)

    def remove(self, lease_id: str, now_s: float) -> Resident | None:
        resident = self.residents.pop(lease_id, None)
        if resident is None:
            return None
        self.stored_decodes -= resident.cost.decodes
        self.stored_kv_tokens -= resident.cost.peak_kv_tokens
        self.stored_prefill_tokens -= resident.cost.prefill_tokens
        if not resident.first_token:
            self.prefill_since_s = now_s  # whose prompt the engine had been at is not known
        self.refresh(now_s)
        return resident

    def first_token(self, lease_id: str, now_s: float) -> None:
        resident = self.residents.get(lease_id)
        if resident is not None and not resident.first_token:
            resident.first_token = True
            resident.advance(max(resident.generated_tokens, 1), now_s)
            self.prefill_since_s = now_s
            self.last_step_s = now_s
            self.refresh(now_s)

    def _add(self, resident: Resident, now_s: float) -> None:
        """What `refresh` makes of a newcomer whose prompt is queued, without looking at the others."""
        count = resident.sequences
        self.seqs += count
        self.queued += count
        self.kv_tokens += resident.kv_tokens
        self.queued_prefill_tokens += resident.prefill_tokens
        if not resident.lost:
            self.tightest_tpot_s = min(self.tightest_tpot_s, resident.tpot_s)
            floor = dict(self.queued_slack_floor)
            left_s = resident.due_s - max(resident.expected_first_s, now_s)
            floor[resident.tpot_s] = min(left_s, floor.get(resident.tpot_s, math.inf))
            self.queued_slack_floor = tuple(floor.items())
        # Only the peak is wanted at once; the curve takes the newcomer in when it is asked for next.
        self.peak_kv_tokens = self.peak_kv_with(resident.request.prompt_tokens, resident.remaining_tokens, count)
        self.peak_after_tokens = math.inf
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, self.peak_kv_tokens)
        self._newcomer = resident

    def _take_newcomer_in(self) -> None:
        """The growth curve with the one resident that is not in it yet, without sorting it anew."""
        newcomer, self._newcomer = self._newcomer, None
        if newcomer is None:
            return
        left = newcomer.remaining_tokens
        at = bisect_right(self._remaining, left)
        kv, seqs = self._suffix_kv, self._suffix_seqs
        self._draw_peaks(
            [*self._remaining[:at], left, *self._remaining[at:]],
            [*[tokens + newcomer.kv_tokens for tokens in kv[: at + 1]], *kv[at:]],
            [*[number + newcomer.sequences for number in seqs[: at + 1]], *seqs[at:]],
        )

    def refresh(self, now_s: float) -> None:
        """Bring every sum up to date: linear in residents, once an event, never in a decision."""
        if not self.residents:
            self._clear_sums()
            return
        slack, queued_slack = dict[float, float](), dict[float, float]()
        seqs = decodes = kv_tokens = decode_kv_tokens = queued = queued_tokens = 0
        tightest = math.inf
        for resident in self.residents.values():
            count = resident.sequences
            seqs += count
            kv_tokens += resident.kv_tokens
            if not resident.first_token:
                if now_s < resident.expected_first_s or resident.request.streamed:
                    queued += count
                    queued_tokens += resident.prefill_tokens
                    if not resident.lost:
                        left_s = resident.due_s - max(resident.expected_first_s, now_s)
                        if left_s < 0.0 and resident.request.streamed:
                            resident.lost = True
                            continue
                        tpot_s = resident.tpot_s
                        if tpot_s < tightest:
                            tightest = tpot_s
                        if left_s < queued_slack.get(tpot_s, math.inf):
                            queued_slack[tpot_s] = left_s
                    continue
                self._guess_progress(resident, now_s)
            decodes += count
            decode_kv_tokens += resident.kv_tokens
            if resident.lost:
                continue
            # from when it was last seen: since then it has moved on with its neighbours
            left_s = resident.due_s - resident.seen_s
            if left_s < 0.0 and resident.request.streamed:
                resident.lost = True
                continue
            tpot_s = resident.tpot_s
            if tpot_s < tightest:
                tightest = tpot_s
            if left_s < slack.get(tpot_s, math.inf):
                slack[tpot_s] = left_s
        foreign = self.foreign
        self.seqs = seqs + foreign.decodes
        self.decodes = decodes + foreign.decodes
        self.kv_tokens = kv_tokens + foreign.peak_kv_tokens
        self.decode_kv_tokens = decode_kv_tokens + foreign.peak_kv_tokens
        self.queued = queued
        self.queued_prefill_tokens = queued_tokens + foreign.queued_prefill_tokens
        self.tightest_tpot_s = tightest
        self.slack_floor = tuple(slack.items())
        self.queued_slack_floor = tuple(queued_slack.items())
        self._draw()

    def _draw(self) -> None:
        """What follows from the sums."""
        self._time_steps()
        self.chunk_room_tokens = self._chunk_room()
        self._draw_growth()

    def _time_steps(self) -> None:
        """A step of the decodes that are here, and the least that one with a full chunk beside them takes."""
        step_time = self.backend.step_time
        self.decode_step_s = step_time.decode_seconds(self.decodes, self.decode_kv_tokens)
        chunk = self.full_chunk_tokens
        self.chunk_step_s = step_time.seconds_of(chunk, 1, 0, 0.0, self.decodes, self.decode_kv_tokens)

    @property
    def full_chunk_tokens(self) -> int:
        """Prompt tokens that a step has room for beside the decodes."""
        return max((self.backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS) - self.decodes, 1)

    def first_token_floor_s(self, prompt_tokens: int, now_s: float) -> float:
        """A bound: no newcomer with so many prompt tokens has its first token sooner, whatever else happens.

        All steps but the last carry a full chunk, and the last takes no less than the decodes alone; what is
        queued ahead has lost at most a chunk for every step that can have ended since its head began.
        """
        chunk = self.full_chunk_tokens
        queued = self.queued_prefill_tokens
        if queued and self.decode_step_s > 0.0:
            # other replicas' queues, which show no progress, have at most the step in flight behind them
            since_s = max(now_s - self.prefill_since_s, 0.0) if self.queued else 0.0
            prompt_tokens += max(queued - (int(since_s / self.decode_step_s) + 1) * chunk, 0)
        return (prompt_tokens - 1) // chunk * self.chunk_step_s + self.decode_step_s

    def _chunk_room(self) -> float:
        """Tokens of a prompt that may be in one step so that every resident's next token is on time."""
        if not self.slack_floor:
            return math.inf
        backend = self.backend
        most = max((backend.limits.max_batched_tokens or _MOST_CHUNK_TOKENS) - self.decodes, 1)
        within_s = min([slack_s + (1.0 - SLACK_RESERVE) * tpot_s for tpot_s, slack_s in self.slack_floor])
        decodes = Step.decode(self.decodes, self.decode_kv_tokens)
        room = backend.step_time.chunk_tokens(decodes, within_s / backend.margin, 0, most)
        return room if room < most else math.inf

    def _guess_progress(self, resident: Resident, now_s: float) -> None:
        """A request that is not streamed shows nothing: it is taken to run at the backend's pace."""
        step_s = self.step_s or self.floor_s
        tokens = 1 + int((now_s - resident.expected_first_s) / step_s) if step_s > 0 else 1
        resident.advance(min(tokens, resident.request.max_output_tokens or tokens), now_s)

    def _draw_growth(self) -> None:
        """The growth curve anew: residents sorted by what they have left, and the sums over those behind each."""
        self._newcomer = None
        order = sorted(self.residents.values(), key=_BY_REMAINING)
        remaining = [r.remaining_tokens for r in order]
        falling = order[::-1]
        suffix_kv = list(accumulate([r.kv_tokens for r in falling], initial=float(self.foreign.peak_kv_tokens)))
        suffix_seqs = list(accumulate([r.sequences for r in falling], initial=0))
        suffix_kv.reverse()
        suffix_seqs.reverse()
        self._draw_peaks(remaining, suffix_kv, suffix_seqs)

    def _draw_peaks(self, remaining: list[float], suffix_kv: list[float], suffix_seqs: list[int]) -> None:
        """KV at each expected end, and what follows from its peak.

        Just before the j-th end (remaining e_j) the KV is sum over i >= j of (kv_i + seqs_i * e_j).
        """
        peaks = [kv + n * e for kv, n, e in zip(suffix_kv, suffix_seqs, remaining, strict=False)]
        self._remaining = remaining
        self._suffix_kv = suffix_kv
        self._suffix_seqs = suffix_seqs
        self._peaks = peaks
        self._peaks_and_steps = list(map(add, peaks, remaining))
        peak = max(peaks)
        self.peak_kv_tokens = math.ceil(peak)
        self.peak_after_tokens = remaining[peaks.index(peak)]
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, self.peak_kv_tokens)

    # --- questions -----------------------------------------------------------------------------------------

    def binding_tpot_s(self, host_tpot_s: float) -> float:
        """The host's pace, where the engine can keep it at all: a pace that it misses even idle binds nobody,
        or whoever has given up a promise would wait for ever."""
        backend = self.backend
        if backend.calibrated and self.alone_s * backend.margin > host_tpot_s:
            return math.inf
        return host_tpot_s

    def peak_kv_with(self, prompt_tokens: int, output_tokens: float, sequences: int = 1) -> int:
        """The most KV everybody will need at once if a newcomer joins: it holds its prompt from the start,
        grows by one token a step and leaves after `output_tokens`."""
        self._take_newcomer_in()
        at = bisect_right(self._remaining, output_tokens)
        base = prompt_tokens * sequences
        own_end = self._suffix_kv[at] + self._suffix_seqs[at] * output_tokens + base + output_tokens * sequences
        peak = max(own_end, max(self._peaks[at:], default=0.0))
        if at:
            # those who end before it: it has grown by one token a step until then
            earlier = max(self._peaks_and_steps[:at]) + base
            if sequences > 1:
                earlier += (sequences - 1) * self._remaining[at - 1]
            peak = max(peak, earlier)
        return math.ceil(peak)

    def kv_fraction(self) -> float:
        capacity = self.backend.limits.kv_tokens
        return self.peak_kv_tokens / capacity if capacity else 0.0

    def _decayed_work(self, now_s: float) -> float:
        return self.prefill_work * math.exp((self.prefill_work_s - now_s) / PREFILL_MEMORY_S)

    def prefill_tokens_per_s(self, now_s: float) -> float:
        """Prompt tokens that come to this backend per second, lately (a mean with an exponential memory)."""
        return self._decayed_work(now_s) / PREFILL_MEMORY_S if self.prefill_work else 0.0

    def first_end_tokens(self) -> float | None:
        """Steps until the first resident is expected to end; None when there is none."""
        self._take_newcomer_in()
        return self._remaining[0] if self._remaining else None

    def own_load(self) -> LoadVector:
        """What this replica carries here, measured: what it publishes."""
        residents: dict[str, int] = {}
        for resident in self.residents.values():
            tier = resident.request.tier
            residents[tier] = residents.get(tier, 0) + resident.request.sequences
        return LoadVector(
            self.seqs - self.foreign.decodes,
            max(self.peak_kv_tokens - self.foreign.peak_kv_tokens, 0),
            self.queued_prefill_tokens - self.foreign.queued_prefill_tokens,
            residents,
        )

    @property
    def idle(self) -> bool:
        return not self.residents and self.foreign.idle
