"""What one request costs a fleet at least: the arithmetic under `simulator.bounds`, on whole arrays of
requests.

**One engine.** Let every step s take at least f + sum_i w_is (`simulator.minorant`; w_is is what request i
adds), and let L_s be its true length. Then sum_i w_is <= L_s - f, so with the price phi(L) = L / (L - f),

    sum_i w_is phi(L_s) <= L_s.

Summed over all steps that an engine runs within a time W: the *cost* of a request, sum_s w_is phi(L_s), added
up over all requests, is at most W. A request makes its share of long steps cheap; but its own steps follow each
other, and those of its first j + 1 tokens lie between its arrival and the deadline of token j. So

    cost_i >= min { sum_s w_is phi(L_s) :  sum_s L_s <= TTFT + (n - 1) TPOT,  first step <= TTFT }

over n steps, one for each of its n tokens. (More steps for the prompt only add fixed time: phi is convex and
decreasing, and one step of the summed length is cheaper.) Slack that is banked early counts: only the sum is
limited. With x_s = L_s - f, phi = 1 + f / x_s, and by Cauchy-Schwarz over the decode steps

    cost_i >= W_p + W_d + f min_x { W_p / x + R^2 / (X - x) },   R = sum of the decode steps' sqrt(w),
    X = TTFT + (n - 1) TPOT - n f,  x <= TTFT - f,

whose minimum is at x = min(X sqrt(W_p) / (sqrt(W_p) + R), TTFT - f). The weights of decodes grow in a straight
line with their contexts, and the root is concave, so R is at least the trapezoid through its first and last
term.

**Nothing here asks on which engine a step runs**: prefill and decode may share engines or not, and a request
may move. KV transfer, refused requests and late ones only add to it, and so does preemption: the prefill that
brings a sequence back is dearer than the decode whose token it emits (an engine that caches prefixes could save
by preempting without need, which none does).

**Cached prefixes.** A block of text is paid for once (`simulator.prefixes`), and since it is open who pays, the
prefill of requests with prefix blocks carries no fixed part (it is not additive).

**Unequal engines.** For weights v_e >= 0 with sum_e v_e M_e = 1, sum_i min_e v_e cost_ie <= W: any weights are
valid. Here they make the kinds about equally attractive. **Split roles** (M_p engines prefill, M_d decode): the
weights 1 / M_p on prefill alone and 1 / M_d on decode alone give one bound each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from simulator.minorant import Floats, Minorant
from simulator.prefixes import free_tokens
from simulator.requests import SimRequest

Bools = npt.NDArray[np.bool_]


class Phase(Enum):
    """Which part of a request is priced."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Sample:
    """The requests that count, as arrays. Times in seconds; `tokens` are of the answers.

    `computed` and `pairs` are prefill tokens and query-key pairs after what a prefix cache saves at best, `fixed`
    whether the prefill's fixed part counts, `start_s` arrivals as offered.
    """

    prompts: Floats
    computed: Floats
    pairs: Floats
    fixed: Bools
    tokens: Floats
    ttft_s: Floats
    tpot_s: Floats
    streamed: Bools
    start_s: Floats
    tiers: npt.NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def of(cls, requests: Sequence[SimRequest], *, prefix_caching: bool = False) -> Sample:
        """The measured requests that promise a TTFT: what attainment is counted over. Tiers tight to loose.

        Raises ValueError when there are none.
        """
        cached = free_tokens(requests) if prefix_caching else [0] * len(requests)
        kept = [
            (sim, free)
            for sim, free in zip(requests, cached, strict=True)
            if sim.measured and sim.request.slo.ttft_s is not None
        ]
        if not kept:
            raise ValueError("requests: none is measured and promises a TTFT")
        paces: dict[str, float] = {}
        for sim, _ in kept:
            tpot_s = _or_infinity(sim.request.slo.tpot_s)
            paces[sim.request.tier] = min(paces.get(sim.request.tier, math.inf), tpot_s)
        names = sorted(paces, key=lambda name: (paces[name], name))
        places = {name: place for place, name in enumerate(names)}
        prompts = np.array([sim.request.prompt_tokens for sim, _ in kept], dtype=np.float64)
        free_of = np.array([free for _, free in kept], dtype=np.float64)
        return cls(
            prompts,
            prompts - free_of,
            (prompts**2 - free_of**2) / 2,
            np.array([not (prefix_caching and sim.prefix_blocks) for sim, _ in kept]),
            np.array([sim.output_tokens for sim, _ in kept], dtype=np.float64),
            np.array([_or_infinity(sim.request.slo.ttft_s) for sim, _ in kept]),
            np.array([_or_infinity(sim.request.slo.tpot_s) for sim, _ in kept]),
            np.array([sim.request.streamed for sim, _ in kept]),
            np.array([sim.request.arrival_s for sim, _ in kept], dtype=np.float64),
            np.array([places[sim.request.tier] for sim, _ in kept], dtype=np.int64),
            tuple(names),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def windows_s(self, tokens: Floats) -> Floats:
        """From arrival to the deadline of the last of each request's first `tokens` tokens."""
        more = np.maximum(tokens - 1, 0.0)
        pace: Floats = np.where(more > 0, self.tpot_s, 0.0)
        windows: Floats = self.ttft_s + more * pace
        return windows

    def due(self, now_s: float, start_s: Floats) -> Floats:
        """How many tokens of each request are due by `now_s`, when they arrive at `start_s`."""
        left_s = now_s - start_s - self.ttft_s
        # A rounding error must not make a token due too early: that would not be a bound.
        later = np.floor(left_s / self.tpot_s - 1e-9)
        due: Floats = np.where(left_s >= 1e-9, np.minimum(np.maximum(later, 0.0) + 1.0, self.tokens), 0.0)
        due[~self.streamed & (due < self.tokens)] = 0.0  # judged by its last token alone
        return due


def _or_infinity(value_s: float | None) -> float:
    return math.inf if value_s is None else value_s


def costs_s(minorant: Minorant, sample: Sample, tokens: Floats, phase: Phase = Phase.BOTH) -> Floats:
    """Least instance-seconds of each request's first `tokens` tokens, all in time; see the module docstring.

    Infinite where no engine could be in time, zero where `tokens` is zero.
    """
    f = minorant.step_s
    steps = np.maximum(tokens - 1.0, 0.0)
    prefill = minorant.prefill_token_s * sample.computed + minorant.pair_s * sample.pairs + minorant.chunk_s
    first = minorant.decode_s + minorant.kv_token_s * (sample.prompts + 1.0)
    last = minorant.decode_s + minorant.kv_token_s * (sample.prompts + np.maximum(steps, 1.0))
    decode = steps * (first + last) / 2
    roots = steps * (np.sqrt(first) + np.sqrt(last)) / 2
    root = np.where(sample.fixed, np.sqrt(prefill), 0.0)
    room = sample.windows_s(tokens) - tokens * f
    first_room = np.where(sample.streamed, sample.ttft_s - f, room)
    own_prefill = np.where(sample.fixed, prefill, 0.0)  # others may pay for what a cache shares
    hopeless = (first_room < own_prefill) | (room < own_prefill + decode)
    if phase is Phase.PREFILL:
        cost = prefill + f * _over(root**2, np.minimum(first_room, room))
    elif phase is Phase.DECODE:
        cost = decode + f * _over(roots**2, room)
    else:
        split = np.minimum(_shared(room, root, roots), first_room)
        rest = np.subtract(room, split, out=np.full_like(room, np.inf), where=np.isfinite(room))
        cost = prefill + decode + f * (_over(root**2, split) + _over(roots**2, rest))
    cost = np.where(hopeless, np.inf, cost)
    result: Floats = np.where(tokens > 0, cost, 0.0)
    return result


def _over(amount: Floats, room: Floats) -> Floats:
    """amount / room; zero where there is no amount or room without end."""
    return np.divide(amount, room, out=np.zeros_like(amount), where=(amount > 0) & (room > 0))


def _shared(room: Floats, root: Floats, roots: Floats) -> Floats:
    """The part of the room that the first step takes when both parts' prices are to be least."""
    both = root + roots
    part = np.divide(root, both, out=np.zeros_like(both), where=both > 0)
    return np.multiply(room, part, out=np.zeros_like(both), where=part > 0)


@dataclass(frozen=True, slots=True)
class Price:
    """Weights on engine kinds: what a request costs of the whole fleet's time at least.

    Attributes:
        parts: (weight, minorant) for every kind of engine; weights times engines sum to one.
        phase: which part of a request is priced; its engines are the only ones that count.
    """

    parts: tuple[tuple[float, Minorant], ...]
    phase: Phase = Phase.BOTH

    def of(self, sample: Sample, tokens: Floats) -> Floats:
        """Fleet-seconds of each request: those of any set that is served in time within W sum to at most W."""
        costs = [weight * costs_s(minorant, sample, tokens, self.phase) for weight, minorant in self.parts]
        least: Floats = np.minimum.reduce(costs)
        return least


def balanced(minorants: Sequence[Minorant], counts: Sequence[int], sample: Sample) -> Price | None:
    """A price for a fleet of several kinds that makes them about equally attractive; None when none can serve."""
    parts: list[tuple[float, Minorant, int]] = []
    for minorant, count in zip(minorants, counts, strict=True):
        costs = costs_s(minorant, sample, sample.tokens)
        served = costs[np.isfinite(costs)]
        if len(served):
            parts.append((1.0 / max(float(served.mean()), 1e-12), minorant, count))
    total = sum(weight * count for weight, _, count in parts)
    return Price(tuple((weight / total, minorant) for weight, minorant, _ in parts)) if parts else None
