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
from collections.abc import Sequence
from dataclasses import replace

from scheduling.backends import Backend
from scheduling.growth import GrowthCurve
from scheduling.load import Floor, LoadVector
from scheduling.news import Told
from scheduling.reserved import reserved_kv_tokens
from scheduling.residents import RECOUNT_TOKENS, Resident
from scheduling.slack import finite, floor_of_queued, lowered, raised
from scheduling.stored import Stored
from tiergate_engine.step import Step

SLACK_RESERVE = 1.0
"""Paces of slack that no placement may plan to spend."""

DEFAULT_CHUNK_TOKENS = 2048
"""Token budget of a step when neither probe nor configuration says one (vLLM's own default online)."""

_MOST_CHUNK_TOKENS = 65_536  # where an engine's token budget is not known
_NOTHING = LoadVector()

PREFILL_MEMORY_S = 10.0
"""Time constant of the mean rate at which prompts come to a backend."""


class Ledger:
    """One backend with its residents. `tier` is its membership (None: the pool)."""

    __slots__ = (
        "_chunk_room_tokens",
        "_chunk_step_s",
        "_chunk_within",
        "_decode_step_s",
        "_growth",
        "_newcomer",
        "_told",
        "_unstreamed",
        "alone_s",
        "asked",
        "backend",
        "blocked_until_s",
        "claiming_for",
        "decode_kv_tokens",
        "decodes",
        "empty_checks",
        "epoch",
        "failures",
        "floor_s",
        "foreign",
        "foreign_since_s",
        "foreign_tpot_s",
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
        "stored",
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
        self.foreign_since_s = -math.inf  # when it was told
        self.foreign_tpot_s = math.inf  # the tightest pace of other replicas' residents
        self.asked = 0  # residents whose lease the store has not answered for
        self.failures = 0
        self.blocked_until_s = -math.inf
        self.empty_checks = 0
        self.step_s: float | None = None
        self.last_step_s: float | None = None
        self.prefill_since_s = -math.inf
        self.prefill_work = 0.0
        self.prefill_work_s = 0.0
        self.stored = Stored()
        self._told = Told()
        self.load = 0.0
        self._unstreamed = 0
        self._growth = GrowthCurve()
        self._clear_sums()

    def _clear_sums(self) -> None:
        self.seqs = self.foreign.decodes
        self.decodes = self.foreign.decodes
        self.queued = 0
        self.kv_tokens = self.decode_kv_tokens = self.peak_kv_tokens = self.foreign.peak_kv_tokens
        self.queued_prefill_tokens = self.foreign.queued_prefill_tokens
        self.tightest_tpot_s = self.foreign_tpot_s
        self.slack_floor: Floor = ()
        self.queued_slack_floor: Floor = ()
        self._newcomer: Resident | None = None
        self._growth.clear(self.foreign.peak_kv_tokens)
        self.peak_after_tokens = 0.0
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, self.peak_kv_tokens)
        self._forget_steps()

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
        self._unstreamed += not resident.request.streamed
        self.asked += 1
        resident.asked = True
        resident.number = self.stored.add(resident.cost)
        if first or self._unstreamed:
            self.refresh(now_s)
        else:
            self._add(resident, now_s)

    def granted(self, lease_id: str) -> None:
        """The store answered: the lease stands."""
        resident = self.residents.get(lease_id)
        if resident is not None and resident.asked:
            resident.asked = False
            self.asked -= 1

    def remove(self, lease_id: str, now_s: float) -> Resident | None:
        resident = self.residents.pop(lease_id, None)
        if resident is None:
            return None
        self.asked -= resident.asked
        self.stored.take(resident.cost, resident.number)
        if not resident.first_token:
            self.prefill_since_s = now_s  # whose prompt the engine had been at is not known
        if not self.residents or self._unstreamed:
            self._unstreamed -= not resident.request.streamed
            self.refresh(now_s)
        else:
            self._subtract(resident)
        return resident

    def begin_publish(self, prefill_left_tokens: int) -> LoadVector | None:
        """What this replica carries here, for the store to count in place of single costs; None when it counts
        about that already, when a lease has been asked for and not answered, or while a publish is on its way.

        Whoever publishes it says by `settle_publish` what came of it."""
        if self.asked or self.stored.publishing:
            return None
        own = replace(self.own_load(), queued_prefill_tokens=prefill_left_tokens)
        if not self._told.is_news(own, self.stored):
            return None
        self.stored.begin(own)
        self._told.begin(own)
        return own

    def settle_publish(self, taken: bool | None) -> None:
        """The store took what was published, refused it, or (None) nobody knows."""
        self.stored.settle(taken)
        self._told.settle(taken)

    def doubt_published(self) -> None:
        """Publish again, news or not."""
        self._told.doubt()

    def set_foreign(self, foreign: LoadVector, tpot_s: float, now_s: float) -> None:
        """Other replicas carry this here; the tightest pace among their residents is `tpot_s`."""
        before, self.foreign, self.foreign_tpot_s = self.foreign, foreign, tpot_s
        self.foreign_since_s = now_s
        if not self.residents or self._unstreamed:
            self.refresh(now_s)
            return
        self._take_newcomer_in()
        decodes = foreign.decodes - before.decodes
        kv_tokens = foreign.peak_kv_tokens - before.peak_kv_tokens
        self.seqs += decodes
        self.decodes += decodes
        self.kv_tokens += kv_tokens
        self.decode_kv_tokens += kv_tokens
        self.queued_prefill_tokens += foreign.queued_prefill_tokens - before.queued_prefill_tokens
        self._loosen()
        self._forget_steps()
        self._growth.add_foreign(kv_tokens)
        self._read_growth()

    def _subtract(self, resident: Resident) -> None:
        """What `refresh` makes of a streamed resident's end, without looking at the others."""
        self._take_newcomer_in()
        count = resident.sequences
        self.seqs -= count
        self.kv_tokens -= resident.kv_tokens
        if resident.first_token:
            self.decodes -= count
            self.decode_kv_tokens -= resident.kv_tokens
        else:
            self.queued -= count
            self.queued_prefill_tokens -= resident.prefill_tokens
        self._forget_steps()
        if not resident.lost:
            self._raise_floor(resident, queued=not resident.first_token)
            self._loosen()
        self._growth.leave(resident, self.foreign.peak_kv_tokens)
        self._read_growth()

    def _raise_floor(self, gone: Resident, *, queued: bool) -> None:
        """The slack floors after somebody left one."""
        if queued:
            self.queued_slack_floor = raised(self.queued_slack_floor, gone, self.residents.values())
        else:
            self.slack_floor = raised(self.slack_floor, gone, self.residents.values())

    def _loosen(self) -> None:
        """The tightest pace on board, after somebody left it or lost its promise: the floors name every pace that
        anybody still stands for."""
        paces_s = [tpot_s for tpot_s, _ in self.slack_floor + self.queued_slack_floor]
        self.tightest_tpot_s = min([self.foreign_tpot_s, *paces_s])

    def first_token(self, lease_id: str, now_s: float) -> None:
        resident = self.residents.get(lease_id)
        if resident is None or resident.first_token:
            return
        self.prefill_since_s = now_s
        self.last_step_s = now_s
        if self._unstreamed:
            resident.first_token = True
            resident.advance(max(resident.generated_tokens, 1), now_s)
            self.refresh(now_s)
            return
        count, before = resident.sequences, resident.kv_tokens
        if not resident.lost:
            self._raise_floor(resident, queued=True)
        resident.first_token = True
        resident.advance(max(resident.generated_tokens, 1), now_s)
        self.queued -= count
        self.queued_prefill_tokens -= resident.prefill_tokens
        self.decodes += count
        self.kv_tokens += resident.kv_tokens - before
        self.decode_kv_tokens += resident.kv_tokens
        self._forget_steps()
        if resident.lost:
            return
        left_s = resident.due_s - now_s
        if left_s < 0.0:
            resident.lost = True
            self._loosen()
            return
        self.slack_floor = lowered(self.slack_floor, resident.tpot_s, left_s)

    def _add(self, resident: Resident, now_s: float) -> None:
        """What `refresh` makes of a newcomer whose prompt is queued, without looking at the others."""
        count = resident.sequences
        self.seqs += count
        self.queued += count
        self.kv_tokens += resident.kv_tokens
        self.queued_prefill_tokens += resident.prefill_tokens
        left_s = resident.due_s - max(resident.expected_first_s, now_s)
        if left_s < 0.0 and resident.request.streamed:
            resident.lost = True
        if not resident.lost:
            self.tightest_tpot_s = min(self.tightest_tpot_s, resident.tpot_s)
            self.queued_slack_floor = lowered(self.queued_slack_floor, resident.tpot_s, left_s)
        # Only the peak is wanted at once; the curve takes the newcomer in when it is asked for next.
        self.peak_kv_tokens = self.peak_kv_with(resident.request.prompt_tokens, resident.remaining_tokens, count)
        self.peak_after_tokens = math.inf
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, self.peak_kv_tokens)
        self._newcomer = resident
        self._growth.enter(resident)

    def _take_newcomer_in(self) -> None:
        """The growth curve with the one resident that is not in it yet, without sorting it anew."""
        newcomer, self._newcomer = self._newcomer, None
        if newcomer is None:
            return
        self._growth.join(newcomer)
        self._read_growth()

    def refresh(self, now_s: float) -> None:
        """Bring every sum up to date: linear in residents, and never in a decision."""
        if not self.residents:
            self._clear_sums()
            return
        self._walk(now_s)
        self._newcomer = None
        self._growth.draw(self.residents.values(), self.foreign.peak_kv_tokens)
        self._read_growth()

    def _walk(self, now_s: float) -> None:
        """The sums and slack floors, from every resident."""
        slack = dict[float, float]()
        decodes = decode_kv_tokens = 0
        infinity = tightest_s = math.inf
        waiting: list[Resident] = []
        for resident in self.residents.values():
            if not resident.first_token:
                if now_s < resident.expected_first_s or resident.request.streamed:
                    waiting.append(resident)
                    continue
                resident.guess_progress(self.step_s or self.floor_s, now_s)
            decodes += resident.sequences
            decode_kv_tokens += resident.kv_tokens
            if resident.lost:
                continue
            # from when it was last seen: since then it has moved on with its neighbours
            left_s = resident.due_s - resident.seen_s
            if left_s < 0.0 and resident.request.streamed:
                resident.lost = True
                continue
            tpot_s = resident.tpot_s
            if tpot_s < tightest_s:
                tightest_s = tpot_s
            if tpot_s < infinity and left_s <= slack.get(tpot_s, infinity):
                slack[tpot_s] = left_s
        self.slack_floor = tuple(slack.items())
        self.queued_slack_floor, queued_s = floor_of_queued(waiting, now_s)
        self.tightest_tpot_s = min(tightest_s, queued_s, self.foreign_tpot_s)
        self._sum_up(decodes, decode_kv_tokens, waiting)

    def _sum_up(self, decodes: int, decode_kv_tokens: int, waiting: list[Resident]) -> None:
        """The sums, of those who decode and those whose prompts are queued."""
        foreign = self.foreign
        self.queued = sum([resident.sequences for resident in waiting])
        self.decodes = decodes + foreign.decodes
        self.seqs = self.decodes + self.queued
        self.decode_kv_tokens = decode_kv_tokens + foreign.peak_kv_tokens
        self.kv_tokens = self.decode_kv_tokens + sum([resident.kv_tokens for resident in waiting])
        queued_tokens = sum([resident.prefill_tokens for resident in waiting])
        self.queued_prefill_tokens = queued_tokens + foreign.queued_prefill_tokens
        self._forget_steps()

    def progressed(self, progress: Sequence[tuple[str, int]], now_s: float) -> None:
        """Streams were at so many tokens, by lease."""
        residents = self.residents
        made = decodes = 0
        for lease_id, tokens in progress:
            resident = residents.get(lease_id)
            if resident is not None and resident.first_token:
                made += tokens - resident.generated_tokens
                decodes += 1
                resident.advance(tokens, now_s)
        self._take_newcomer_in()
        drift = self._growth.shift(made / decodes) if decodes else 0.0
        if drift >= RECOUNT_TOKENS or self._unstreamed or not residents:
            self.refresh(now_s)
        else:
            self._walk(now_s)
            self._read_growth()

    def _forget_steps(self) -> None:
        """The sums have changed; what follows from them is reckoned when it is asked for."""
        self._decode_step_s = self._chunk_step_s = self._chunk_room_tokens = -1.0
        self._chunk_within: tuple[float, int, float] | None = None

    @property
    def decode_step_s(self) -> float:
        """A step of the decodes that are here."""
        if self._decode_step_s < 0.0:
            self._decode_step_s = self.backend.step_time.decode_seconds(self.decodes, self.decode_kv_tokens)
        return self._decode_step_s

    @property
    def chunk_step_s(self) -> float:
        """The least time from one full chunk to the next, with these decodes."""
        if self._chunk_step_s < 0.0:
            self._chunk_step_s = self.backend.chunk_step_s(
                self.full_chunk_tokens, self.decodes, self.decode_kv_tokens
            )
        return self._chunk_step_s

    @property
    def chunk_room_tokens(self) -> float:
        """Tokens of a prompt that may be in one step so that every resident's next token is on time."""
        if self._chunk_room_tokens < 0.0:
            self._chunk_room_tokens = self._chunk_room()
        return self._chunk_room_tokens

    @property
    def full_chunk_tokens(self) -> int:
        """Prompt tokens that a step has room for, beside decodes that share it, or the fewer that were set."""
        decodes = self.decodes if self.backend.prefill_interval is None else 0
        room = max((self.backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS) - decodes, 1)
        return min(room, self.backend.chunk_tokens or room)

    def chunk_within(self, within_s: float) -> tuple[int, float]:
        """The largest chunk, of a prompt's beginning, that keeps a step with today's decodes within a time (at
        least one token: prompts go on, however slowly), and how long that step takes."""
        known = self._chunk_within
        if known is None or known[0] != within_s:
            step_time = self.backend.step_time
            decodes = Step.decode(self.decodes, self.decode_kv_tokens)
            chunk = max(step_time.chunk_tokens(decodes, within_s, 0, self.full_chunk_tokens), 1)
            took_s = step_time.seconds_of(chunk, 1, 0, chunk * chunk / 2, self.decodes, self.decode_kv_tokens)
            known = self._chunk_within = (within_s, chunk, took_s)
        return known[1], known[2]

    def _chunk_room(self) -> float:
        floors = self.slack_floor + self.foreign.slack
        if not floors:
            return math.inf
        backend = self.backend
        most = max((backend.limits.max_batched_tokens or _MOST_CHUNK_TOKENS) - self.decodes, 1)
        most = min(most, backend.ahead_chunk_tokens or most)
        within_s = min([slack_s + (1.0 - SLACK_RESERVE) * tpot_s for tpot_s, slack_s in floors])
        if within_s == math.inf:
            return math.inf
        decodes = Step.decode(self.decodes, self.decode_kv_tokens)
        room = backend.chunk_within(decodes, within_s / backend.margin, most)
        return room if room < most else math.inf

    def _read_growth(self) -> None:
        growth = self._growth
        self.peak_kv_tokens = growth.peak_tokens
        self.peak_after_tokens = growth.peak_after_tokens
        self.floor_s = self.backend.step_time.decode_seconds(self.seqs + 1, growth.peak_tokens)

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
        return self._growth.peak_with(prompt_tokens, output_tokens, sequences)

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
        return self._growth.first_end_tokens()

    def own_load(self) -> LoadVector:
        """What this replica carries here, measured: what it publishes."""
        residents: dict[str, int] = {}
        reserved = reserved_kv_tokens(self.backend.limits, self.residents.values())
        for resident in self.residents.values():
            tier = resident.cost.tier
            residents[tier] = residents.get(tier, 0) + resident.request.sequences
        return LoadVector(
            self.seqs - self.foreign.decodes,
            max(self.peak_kv_tokens - self.foreign.peak_kv_tokens, reserved),
            self.queued_prefill_tokens - self.foreign.queued_prefill_tokens,
            residents,
            slack=finite(self.slack_floor),
            queued_slack=finite(self.queued_slack_floor),
        )

    @property
    def idle(self) -> bool:
        return not self.residents and self.foreign.idle
