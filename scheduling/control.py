"""What every backend's knobs should be set to, so that its tier's promises are kept: values, each with its reason.

The ladder, by what a backend lets itself be told: it plans its own steps by what its requests were promised; the
prompt tokens of a step are set; the running sequences are capped; prompts are let in at a rate; sequences are let
in up to a number; and where not even one sequence keeps the tier's pace, a looser tier.

Knobs must not flap: one is tightened at once, and loosened only by a noticeable step that has stood for a while.
"""

from __future__ import annotations

import math
from collections import deque

from scheduling.knobs import ControlOptions, Knob, Means, Rung, Setting
from scheduling.ledger import DEFAULT_CHUNK_TOKENS, Ledger
from scheduling.pacing import ChunkCost
from scheduling.tiers import TierSet
from tiergate_engine.control import EngineState, Orders
from tiergate_engine.step import Step

_PROBES = (Step.decode(1, 1_000), Step.decode(64, 64_000), Step.decode(64, 64_000) + Step.chunk(512))
"""Steps by which two profiles are compared."""


class _Known:
    """One backend's knobs, and what was decided of it."""

    __slots__ = ("cap", "chunk", "concurrency", "faster_since_s", "probes", "rate", "setting", "told")

    def __init__(self, kept: int) -> None:
        self.chunk, self.cap, self.rate, self.concurrency = Knob(), Knob(), Knob(), Knob()
        self.probes: tuple[float, ...] = ()  # how long steps take by what a driven engine was told
        self.faster_since_s: float | None = None
        self.setting: Setting | None = None
        self.told: deque[Setting] = deque(maxlen=kept)


class Controller:
    """Decides for each backend of a fleet; remembers what it decided. Pure: `now_s` only goes forward."""

    def __init__(self, options: ControlOptions | None = None) -> None:
        self.options = options or ControlOptions()
        self._known: dict[str, _Known] = {}

    def decisions(self, backend: str) -> tuple[Setting, ...]:
        """The latest ones, oldest first; none for a backend that nothing was decided of."""
        known = self._known.get(backend)
        return () if known is None else tuple(known.told)

    def forget(self, backend: str) -> None:
        """It is gone, or is not to be driven any more."""
        self._known.pop(backend, None)

    def decide(self, ledger: Ledger, means: Means, host_tpot_s: float, tiers: TierSet, now_s: float) -> Setting:
        """What a backend is to be set to: the same value as before as long as nothing changes.

        `host_tpot_s`: the pace that it keeps for newcomers.
        """
        known = self._known.setdefault(ledger.backend.name, _Known(self.options.kept))
        wanted = self._wanted(known, ledger, means, host_tpot_s, tiers, now_s)
        if known.setting is None or not wanted.same_as(known.setting):
            known.setting = wanted
            known.told.append(wanted)
        return known.setting

    def _wanted(
        self, known: _Known, ledger: Ledger, means: Means, host_s: float, tiers: TierSet, now_s: float
    ) -> Setting:
        backend = ledger.backend
        if not backend.calibrated:
            return Setting(Rung.UNSET, "its step times are not known yet", now_s)
        if means.orders:
            return self._driven(known, ledger, now_s)
        pace_s = min(host_s, ledger.tightest_tpot_s)
        alone_s = ledger.alone_s * backend.margin
        if alone_s > host_s:
            return _unreachable(ledger, host_s, tiers, now_s)
        if alone_s > pace_s:
            pace_s = host_s  # a resident's pace that it misses even idle binds nobody
        if means.chunk_budget:
            return self._chunked(known, ledger, means, pace_s, now_s)
        if means.running_cap or means.admission:
            return self._capped(known, ledger, means, pace_s, now_s)
        return Setting(Rung.UNSET, "it takes no setting; what is let in keeps its promises", now_s)

    def _driven(self, known: _Known, ledger: Ledger, now_s: float) -> Setting:
        """Profile and margin, told anew when steps became noticeably slower, or have been faster for a while."""
        backend, step = ledger.backend, 1.0 + self.options.profile_step
        probes = tuple([backend.step_time.seconds(one) * backend.margin for one in _PROBES])
        before = known.setting
        if before is not None and before.rung is Rung.DRIVEN:
            ratios = [new / old for new, old in zip(probes, known.probes, strict=True) if old > 0.0]
            slower = max(ratios, default=1.0) > step
            if not slower and min(ratios, default=1.0) >= 1.0 / step:
                known.faster_since_s = None
                return before
            if not slower:
                if known.faster_since_s is None:
                    known.faster_since_s = now_s
                if now_s - known.faster_since_s < self.options.raise_after_s:
                    return before
            reason = f"its steps take {ratios[0]:.2f} of what it was told"
        else:
            reason = "it plans each step by the slack of those on board"
        known.probes, known.faster_since_s = probes, None
        return Setting(
            Rung.DRIVEN,
            f"{reason} (margin {backend.margin:.2f})",
            now_s,
            step_time=backend.step_time,
            margin=backend.margin,
        )

    def _chunked(self, known: _Known, ledger: Ledger, means: Means, pace_s: float, now_s: float) -> Setting:
        wanted = chunk_budget(ledger, pace_s, self.options, alone=means.chunk_alone)
        chunk = known.chunk.tokens(wanted, now_s, self.options)
        cap = self._cap(known.cap, ledger, pace_s, now_s) if means.running_cap else None
        if chunk is None:
            reason = f"its own budget keeps {_pace(pace_s)} with {ledger.decodes} decodes"
        else:
            reason = f"{chunk} prompt tokens a step keep {_pace(pace_s)} with {ledger.decodes} decodes"
        return Setting(Rung.CHUNK_BUDGET, reason, now_s, chunk_tokens=chunk, running_cap=cap)

    def _cap(self, knob: Knob, ledger: Ledger, pace_s: float, now_s: float) -> int | None:
        return knob.tokens(most_running(ledger, pace_s, self.options), now_s, self.options)

    def _capped(self, known: _Known, ledger: Ledger, means: Means, pace_s: float, now_s: float) -> Setting:
        cap = self._cap(known.cap, ledger, pace_s, now_s) if means.running_cap else None
        rate: int | None = None
        if means.admission:
            rate_s = _on_grid(prefill_rate_tokens_s(ledger, pace_s, alone=means.chunk_alone), 1)
            rate = known.rate.tokens(rate_s, now_s, self.options)
        if means.running_cap:
            reason = f"{'any number' if cap is None else cap} running keep {_pace(pace_s)}"
            return Setting(Rung.RUNNING_CAP, reason, now_s, running_cap=cap, prefill_tokens_s=rate)
        if rate == 0:
            most = self._cap(known.concurrency, ledger, pace_s, now_s)
            reason = f"its {ledger.decodes} decodes leave no time to prompts within {_pace(pace_s)}"
            return Setting(Rung.CONCURRENCY_CAP, reason, now_s, prefill_tokens_s=rate, concurrency=most)
        much = "any number of" if rate is None else rate
        reason = f"{much} prompt tokens a second leave {_pace(pace_s)} to {ledger.decodes} decodes"
        return Setting(Rung.PREFILL_PACING, reason, now_s, prefill_tokens_s=rate)


def chunk_budget(ledger: Ledger, pace_s: float, options: ControlOptions, *, alone: bool = False) -> float:
    """The most prompt tokens beside today's decodes with which a step, with its margin, keeps a pace: on a coarse
    grid, and at least the floor. Infinite where the engine's own budget keeps it. `alone`: chunks have steps of
    their own; the engine's own budget is named then, because only with one set does a step of decodes lie between
    two of them."""
    backend = ledger.backend
    decodes = max(ledger.decodes, 1)  # an engine without any is soon to have some
    base = Step.decode(decodes, max(ledger.decode_kv_tokens, 1))
    budget = backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS
    limit = budget if alone else max(budget - decodes, 1)
    within_s = pace_s / backend.margin
    if within_s == math.inf:
        return math.inf
    if alone:
        within_s -= backend.step_time.seconds(base)
        base = Step()
    context = longest_queued(ledger)
    tokens = backend.step_time.chunk_tokens(base, within_s, context, limit) if within_s > 0.0 else 0
    if tokens >= limit:
        return limit if alone else math.inf
    return max(_on_grid(tokens, options.floor_tokens), options.floor_tokens)


def longest_queued(ledger: Ledger) -> int:
    """Prompt tokens of the longest prompt that waits here: the most context that a chunk may have behind it."""
    waiting = [one.request.prompt_tokens for one in ledger.residents.values() if not one.first_token]
    return max(waiting, default=0)


def most_running(ledger: Ledger, pace_s: float, options: ControlOptions) -> float:
    """The most decodes, each with the KV of those here at their peak, whose step keeps a pace; at least one.
    Infinite where the engine's own cap keeps it."""
    backend = ledger.backend
    within_s = pace_s / backend.margin
    each = ledger.peak_kv_tokens / ledger.seqs if ledger.seqs else options.kv_each_tokens
    most = backend.limits.max_running_seqs or 4_096
    seconds = backend.step_time.decode_seconds
    if seconds(most, each * most) <= within_s:
        return math.inf
    low, high = 1, most  # the first may be let in, the last may not
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle, each * middle) <= within_s:
            low = middle
        else:
            high = middle
    return max(_on_grid(low, 1), 1)


def prefill_rate_tokens_s(ledger: Ledger, pace_s: float, *, alone: bool = False) -> float:
    """Prompt tokens a second with which today's decodes keep a pace on average (`scheduling.pacing`)."""
    backend = ledger.backend
    budget = backend.limits.max_batched_tokens or DEFAULT_CHUNK_TOKENS
    decodes = Step.decode(ledger.decodes, ledger.decode_kv_tokens)
    return ChunkCost.of(backend.step_time, decodes, budget, alone=alone).rate_tokens_s(pace_s / backend.margin)


def must_speak(state: EngineState, orders: Orders, own_digest: str | None, options: ControlOptions) -> bool:
    """Whether orders have to be given (again). `own_digest`: of the last ones that this gateway gave.

    Several gateways may drive one engine, and their orders may differ a little. The engine then obeys one of them,
    and the others are silent until that one is.
    """
    age_s = math.inf if state.orders_age_s is None else state.orders_age_s
    if state.orders_digest is None:
        return True
    if state.orders_digest == orders.digest:
        return orders.lapse_s is not None and age_s >= options.refresh_s
    return state.orders_digest == own_digest or age_s >= options.yield_s


def _unreachable(ledger: Ledger, host_s: float, tiers: TierSet, now_s: float) -> Setting:
    """A tier whose pace the backend can keep, for one that cannot keep its own with a single decode."""
    alone_s = ledger.alone_s * ledger.backend.margin
    fits = [tier.name for tier in tiers.tiers if tier.host_tpot_s >= alone_s]
    tier = fits[0] if fits else None
    reason = f"a single decode takes {alone_s * 1e3:.1f} ms, its tier's pace is {host_s * 1e3:g} ms"
    return Setting(Rung.LOOSER_TIER, reason, now_s, tier=tier)


def _on_grid(tokens: float, least: int) -> float:
    """Rounded down to eighths of the power of two below it, but to no less than multiples of `least`."""
    if tokens == math.inf:
        return tokens
    whole = int(tokens)
    step = max(1 << max(whole.bit_length() - 4, 0), least)
    return whole // step * step


def _pace(pace_s: float) -> str:
    return "every pace" if pace_s == math.inf else f"{pace_s * 1e3:g} ms"
