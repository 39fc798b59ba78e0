"""The tier-packed reference: what "of optimal" means, and how much separating tiers can win at all.

A class of requests has an engine to itself, in perfect balance: B sequences decode while the prompts of as many
newcomers as leave are prefilled beside them (co-located), or on engines of their own (disaggregated). All steps
are alike, every batch is the cheapest that keeps the class's pace, nothing is lost to arrivals, lengths or
rounding to whole engines:

    co-located      cost_k = d_k T_k / B_k             T_k the step of B_k decodes and B_k p_k / d_k prefill tokens
    disaggregated   cost_k = d_k T_k / B_k + p_k / (prefill tokens per second)
    optimal_rate(M) = M / sum_k share_k cost_k

This is the cost model of PolyServe §3.4-3.5 (arXiv 2507.17769), whose exact formula is not public, solved on
the profile's own step times. Three choices are ours. A sequence takes part in one decode step less than its
answer has tokens, since the step that ends its prompt emits the first; d is the mean of that. KV is what
residents hold on average over their steps, not their final length. And B is the cheapest batch within the pace,
not the greatest: on some engines the cost of a token rises again with the size of a step.

It is a yardstick, not a bound: deadlines are kept by constant steps, without the slack that a TTFT or a fast
start gives (`simulator.bounds` has what nobody can beat)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scheduling.backends import EngineLimits
from simulator.prefixes import free_tokens
from simulator.requests import SimRequest
from simulator.scenario import Form
from tiergate_engine.step import Step, StepTime
from tiergate_engine.steptime import ShiftedStepTime

MOST_SEQS = 1024
"""Sequences in one step where an engine's limits name no number."""
MOST_BATCHED_TOKENS = 8192
"""Tokens in one step where an engine's limits name no number."""

_PROBE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the requests of a class are on average, as far as an engine's steps feel it.

    Attributes:
        prompt_tokens: to be computed in prefill (without what a prefix cache has).
        decode_steps: output tokens after the first.
        resident_kv_tokens: KV of one decoding sequence, mean over decode steps.
        attention_per_token: query-key pairs for each prefill token, whatever the chunks (`Step`'s attention sum).
    """

    prompt_tokens: float
    decode_steps: float
    resident_kv_tokens: float
    attention_per_token: float

    @classmethod
    def equal(cls, prompt_tokens: float, output_tokens: float) -> Lengths:
        """Requests that are all alike."""
        steps = output_tokens - 1
        return cls(prompt_tokens, steps, prompt_tokens + (steps + 1) / 2, prompt_tokens / 2)

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int, int]]) -> Lengths:
        """The averages of (prompt tokens, how many of them a cache has, output tokens).

        Raises ValueError when there are none, or a prompt is cached to its last token.
        """
        count = prompts = areas = steps = kv = 0.0
        for prompt_tokens, cached_tokens, output_tokens in lengths:
            if not 0 <= cached_tokens < prompt_tokens:
                raise ValueError(
                    f"cached_tokens ({cached_tokens}) must be less than prompt_tokens ({prompt_tokens})"
                )
            decodes = output_tokens - 1
            count += 1
            prompts += prompt_tokens - cached_tokens
            areas += (prompt_tokens**2 - cached_tokens**2) / 2
            steps += decodes
            kv += decodes * (prompt_tokens + (decodes + 1) / 2)
        if not count:
            raise ValueError("lengths: at least one request is needed")
        return cls(prompts / count, steps / count, kv / steps if steps else 0.0, areas / prompts)

    @classmethod
    def mixed(cls, parts: Sequence[tuple[float, Lengths]]) -> Lengths:
        """Classes in one pool, with their shares (any positive weights)."""
        total = sum(share for share, _ in parts)
        prompts = sum(share * part.prompt_tokens for share, part in parts)
        steps = sum(share * part.decode_steps for share, part in parts)
        kv = sum(share * part.decode_steps * part.resident_kv_tokens for share, part in parts)
        areas = sum(share * part.prompt_tokens * part.attention_per_token for share, part in parts)
        return cls(prompts / total, steps / total, kv / steps if steps else 0.0, areas / prompts)


@dataclass(frozen=True, slots=True)
class TierNeed:
    """A class of requests: its share (any positive weight), the pace it is promised, and its lengths."""

    name: str
    share: float
    tpot_s: float
    lengths: Lengths


def needs_of(requests: Iterable[SimRequest], *, prefix_caching: bool = False) -> tuple[TierNeed, ...]:
    """The tiers of what is really offered, tight to loose, by their shares and mean lengths.

    With prefix caching every block of text is computed once, as in a cache that never forgets. Requests that
    promise no TPOT are left out: they ask for no capacity. Raises ValueError when none is left.
    """
    offered = list(requests)
    cached = free_tokens(offered) if prefix_caching else [0] * len(offered)
    rows: dict[tuple[float, str], list[tuple[int, int, int]]] = {}
    for sim, free in zip(offered, cached, strict=True):
        tpot_s = sim.request.slo.tpot_s
        if tpot_s is not None:
            row = (sim.request.prompt_tokens, free, sim.output_tokens)
            rows.setdefault((tpot_s, sim.request.tier), []).append(row)
    if not rows:
        raise ValueError("requests: none of them promises a TPOT")
    return tuple(
        TierNeed(name, float(len(found)), tpot_s, Lengths.of(found))
        for (tpot_s, name), found in sorted(rows.items())
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A class alone on its engines, in balance.

    Attributes:
        batch: sequences that decode in every step (B_k); 0 when the pace cannot be kept.
        chunk_tokens: prefill tokens beside them; 0 when disaggregated.
        step_s: how long such a step takes.
        decode_s: cost of a request in instance-seconds: all of it when co-located, without prefill when not.
        prefill_s: cost of its prefill on engines that do nothing else; 0 when co-located.
    """

    name: str
    share: float
    tpot_s: float
    batch: int
    chunk_tokens: int
    step_s: float
    decode_s: float
    prefill_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """Instance-seconds a request; infinity when not even one sequence keeps the pace."""
        return self.decode_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Reference:
    """The tiers each on engines of their own, and beside it all of them in one pool at the tightest pace."""

    form: Form
    tiers: tuple[Packed, ...]
    pool: Packed

    @property
    def cost_s(self) -> float:
        """Instance-seconds a request, over the mix."""
        total = sum(tier.share for tier in self.tiers)
        return sum(tier.share * tier.cost_s for tier in self.tiers) / total

    @property
    def prefill_share(self) -> float:
        """Which part of the cost is prefill on engines of its own; 0 when co-located."""
        total = sum(tier.share for tier in self.tiers)
        return sum(tier.share * tier.prefill_s for tier in self.tiers) / total / self.cost_s

    @property
    def separation_gain(self) -> float:
        """How much more the tiers on engines of their own serve than one mixed pool at the tightest pace."""
        return self.pool.cost_s / self.cost_s

    def optimal_rate(self, instances: int) -> float:
        """Requests per second with perfect packing; 0 when a tier's pace cannot be kept."""
        return instances / self.cost_s

    def pool_rate(self, instances: int) -> float:
        """The same with one mixed pool at the tightest pace."""
        return instances / self.pool.cost_s

    def prefill_backends(self, backends: int) -> int:
        """How many of a disaggregated fleet should prefill: the split whose slower side is fastest.

        Raises ValueError for fewer than two backends.
        """
        if backends < 2:
            raise ValueError(f"a disaggregated fleet needs at least two backends, not {backends}")
        share = self.prefill_share
        if not 0.0 < share < 1.0:
            return 1 if share <= 0.0 else backends - 1
        return max(range(1, backends), key=lambda n: (min(n / share, (backends - n) / (1.0 - share)), -n))


def reference(
    step_time: StepTime,
    limits: EngineLimits,
    tiers: Sequence[TierNeed],
    form: Form = Form.COLOCATED,
    *,
    host_step_s: float = 0.0,
    host_seq_s: float = 0.0,
) -> Reference:
    """Solve the reference model for a fleet of equal engines.

    Unknown limits limit nothing but the batch (`MOST_SEQS`) and the step (`MOST_BATCHED_TOKENS`).
    Raises ValueError when there are no tiers.
    """
    if not tiers:
        raise ValueError("tiers: at least one is needed")
    engine = _Engine(step_time, limits, host_step_s, host_seq_s)
    pack = _together if form is Form.COLOCATED else _apart
    merged = TierNeed(
        "pool",
        sum(tier.share for tier in tiers),
        min(tier.tpot_s for tier in tiers),
        Lengths.mixed([(tier.share, tier.lengths) for tier in tiers]),
    )
    return Reference(form, tuple(pack(engine, tier) for tier in tiers), pack(engine, merged))


def fixed_s(step_time: StepTime) -> float:
    """The fixed part t0 of a step: what a step costs beside what its tokens cost, where these are compute-bound.

    Two prompts of 512 tokens can be prefilled in one step or in two; the second step costs t0 more:
    `2 T(one prompt) - T(both)`. That is the intercept of step time over tokens between 512 and 1,024 tokens, past
    the point where reading the weights hides the first tokens' work, and near the size of a step at a tight pace.
    It bounds what separating tiers can win, since the cost of a tier is in proportion to TPOT / (TPOT - t0).
    """
    one = Step.chunk(_PROBE_TOKENS)
    return max(2 * step_time.seconds(one) - step_time.seconds(one + one), 0.0)


def with_fixed_s(step_time: StepTime, wanted_s: float) -> StepTime:
    """A step time whose fixed part is `wanted_s` in place of its own.

    Raises ValueError when its own is already greater: a measured profile is not made faster than it is.
    """
    own_s = fixed_s(step_time)
    if not wanted_s >= own_s:
        raise ValueError(f"a fixed part of {wanted_s * 1e3:g} ms is less than the profile's {own_s * 1e3:.2f} ms")
    return ShiftedStepTime(step_time, wanted_s - own_s)


def closed_form_gain(own_s: float, paces_s: Sequence[float], shares: Sequence[float]) -> float:
    """`Reference.separation_gain` where a step takes t0 (`own_s`) plus so much for every token, and nothing else.

    The cost of a tier is then in proportion to TPOT / (TPOT - t0). All paces must be above t0.
    """
    costs = [pace_s / (pace_s - own_s) for pace_s in paces_s]
    return max(costs) * sum(shares) / sum(share * cost for share, cost in zip(shares, costs, strict=True))


class _Engine:
    """Times of balanced steps on one engine, host time included."""

    def __init__(self, step_time: StepTime, limits: EngineLimits, host_step_s: float, host_seq_s: float) -> None:
        self._step_time = step_time
        self._host_step_s = host_step_s
        self._host_seq_s = host_seq_s
        self.most_seqs = limits.max_running_seqs or MOST_SEQS
        self.most_tokens = limits.max_batched_tokens or MOST_BATCHED_TOKENS
        self.kv_tokens = math.inf if limits.kv_tokens is None else limits.kv_tokens

    def step_s(self, batch: int, chunk_tokens: int, lengths: Lengths) -> float:
        """A step of `batch` average residents beside `chunk_tokens` of average prompts."""
        area = chunk_tokens * lengths.attention_per_token
        context = max(0, round(lengths.attention_per_token - chunk_tokens / 2)) if chunk_tokens else 0
        chunks = math.ceil(chunk_tokens / lengths.prompt_tokens)
        step_s = self._step_time.seconds_of(
            chunk_tokens, chunks, context, area, batch, batch * lengths.resident_kv_tokens
        )
        return step_s + self._host_step_s + self._host_seq_s * (batch + chunks)

    def prefill_s_per_token(self, lengths: Lengths, within_s: float = math.inf) -> float:
        """The cheapest prefill in steps of nothing else; infinity when no chunk keeps the time."""
        best = math.inf
        for chunk_tokens in _sizes(self.most_tokens):
            step_s = self.step_s(0, chunk_tokens, lengths)
            if step_s <= within_s:
                best = min(best, step_s / chunk_tokens)
        return best


def _together(engine: _Engine, tier: TierNeed) -> Packed:
    """The cheapest balanced mixed step within the pace."""
    lengths = tier.lengths
    if not lengths.decode_steps:
        cost_s = lengths.prompt_tokens * engine.prefill_s_per_token(lengths)
        return Packed(tier.name, tier.share, tier.tpot_s, 0, 0, 0.0, cost_s)
    chunk_per_seq = lengths.prompt_tokens / lengths.decode_steps

    def step(batch: int) -> tuple[int, float]:
        chunk_tokens = math.ceil(batch * chunk_per_seq)
        if chunk_tokens + batch > engine.most_tokens:
            return chunk_tokens, math.inf
        return chunk_tokens, engine.step_s(batch, chunk_tokens, lengths)

    packed = _cheapest(engine, tier, step)
    if packed.batch:
        return packed
    # So long a prompt for so short an answer that not even one resident can be kept beside its successor's chunks:
    # one decodes in every step and another is prefilled meanwhile, as fast as the pace allows.
    best, best_s, best_chunk = math.inf, 0.0, 0
    for chunk_tokens in _sizes(min(engine.most_tokens - 1, int(chunk_per_seq))):
        step_s = engine.step_s(1, chunk_tokens, lengths)
        if step_s <= tier.tpot_s and lengths.prompt_tokens * step_s / chunk_tokens < best:
            best, best_s, best_chunk = lengths.prompt_tokens * step_s / chunk_tokens, step_s, chunk_tokens
    batch = 1 if best < math.inf else 0
    return Packed(tier.name, tier.share, tier.tpot_s, batch, best_chunk, best_s, best)


def _apart(engine: _Engine, tier: TierNeed) -> Packed:
    """The cheapest decode-only step within the pace, and prefill elsewhere."""
    lengths = tier.lengths
    prefill_s = lengths.prompt_tokens * engine.prefill_s_per_token(lengths)
    if not lengths.decode_steps:
        return Packed(tier.name, tier.share, tier.tpot_s, 0, 0, 0.0, 0.0, prefill_s)
    packed = _cheapest(engine, tier, lambda batch: (0, engine.step_s(batch, 0, lengths)))
    return Packed(tier.name, tier.share, tier.tpot_s, packed.batch, 0, packed.step_s, packed.decode_s, prefill_s)


def _cheapest(engine: _Engine, tier: TierNeed, step: Callable[[int], tuple[int, float]]) -> Packed:
    """The batch with the lowest cost among those that keep pace and memory; an infinite cost without one."""
    lengths = tier.lengths
    best = Packed(tier.name, tier.share, tier.tpot_s, 0, 0, 0.0, math.inf)
    for batch in range(1, engine.most_seqs + 1):
        chunk_tokens, step_s = step(batch)
        if step_s > tier.tpot_s or batch * lengths.resident_kv_tokens > engine.kv_tokens:
            break
        cost_s = lengths.decode_steps * step_s / batch
        if cost_s < best.decode_s:
            best = Packed(tier.name, tier.share, tier.tpot_s, batch, chunk_tokens, step_s, cost_s)
    return best


def _sizes(most: int) -> list[int]:
    """Chunk sizes to try: about 3 % apart, the greatest among them."""
    sizes = {most} if most > 0 else set()
    size = 1.0
    while size < most:
        sizes.add(int(size))
        size = max(size + 1.0, size * 1.03)
    return sorted(sizes)
