"""True upper bounds: rates that no schedule of any policy can beat, not even one that knows all lengths.

The bound is a relaxation: requests may be cut to pieces and packed perfectly onto the fleet, every answer's
length is known, every request has its steps as long as its own deadlines allow (all slack used), and the
dearest requests may be dropped before they cost anything. `simulator.pricing` proves what a request then costs
at least. For a set of requests served in time within W seconds these costs, as parts of the fleet, sum to at
most W. So

* *in the long run* a rate r with attainment q needs (1 / N) sum of the cheapest qN costs <= 1 / r;
* *in a run* with given arrivals, at every moment t, what is due by t has been done between the first arrival
  and t. A run is shorter than for ever, and work due after its last arrival is served while it drains; so its
  bound is a little higher. It is the one that a measured run must obey to the letter.

Every minorant of the step time gives a bound and each of them holds, so the least counts. KV capacity is in the
minorants: they only hold for steps that fit the memory, and there they may price tokens of context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduling.backends import EngineLimits
from simulator.minorant import Floats, Minorant, Minorants, Range
from simulator.pricing import Phase, Price, Sample, balanced
from simulator.requests import SimRequest
from tiergate_engine.step import Step, StepTime

_SCALES = (0.7, 1.0, 1.3)
_PRECISION = 1e-3  # of a run's highest rate, on the safe side
_MOST_DOUBLINGS = 8
_DRAIN_PARTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # quantiles of the requests' windows after the last arrival


class BoundExceededError(AssertionError):
    """A result that no schedule can have: the simulator, the scoring or the bound is wrong."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """Some equal engines.

    Attributes:
        step_time: of the real engine, not of a predictor.
        limits: what a step can hold.
        host_step_s, host_seq_s: host time that the step time does not contain.
    """

    step_time: StepTime
    limits: EngineLimits
    count: int
    host_step_s: float = 0.0
    host_seq_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The highest rates at which a goal can be met, in requests per second.

    Attributes:
        long_run_rps: for ever, with lengths like these.
        run_rps: in this very run; infinity when it is too short to say.
    """

    long_run_rps: float
    run_rps: float


@dataclass(frozen=True, slots=True)
class TierCost:
    """A tier in the bound at 90 % overall.

    Attributes:
        cost_s: least instance-seconds a request, mean over those that can be served at all.
        hopeless: share of its requests that no engine serves in time, even alone.
        dropped: share of its requests among the dearest tenth of all.
    """

    name: str
    requests: int
    cost_s: float
    hopeless: float
    dropped: float


class Bound:
    """What nobody can beat on a fleet with these very requests; made by `upper_bound`."""

    def __init__(self, sample: Sample, prices: Sequence[Price], rate_rps: float, engines: int) -> None:
        self._sample = sample
        self._prices = tuple(prices)
        self._costs = tuple(price.of(sample, sample.tokens) for price in prices)
        self._rate_rps = rate_rps
        self._engines = engines

    @property
    def requests(self) -> int:
        """How many are counted: measured ones with a promise."""
        return len(self._sample)

    def ceiling(self, attainment: float, *, every_tier: bool = False) -> Ceiling:
        """The highest rates at which `attainment` (0 to 1) can be reached: overall, or in every tier.

        The dearest requests beyond it are dropped, of all or of each tier.
        """
        return Ceiling(
            self.long_run_rps(attainment, every_tier=every_tier), self.run_rps(attainment, every_tier=every_tier)
        )

    def long_run_rps(self, attainment: float, *, every_tier: bool = False) -> float:
        """`Ceiling.long_run_rps`."""
        total_s, _ = self._strictest(attainment, every_tier)
        return len(self._sample) / total_s if total_s else math.inf

    def run_rps(self, attainment: float, *, every_tier: bool = False) -> float:
        """`Ceiling.run_rps`: by the price that is strictest in the long run, then by any that is stricter here."""
        total_s, place = self._strictest(attainment, every_tier)
        if not total_s or math.isinf(total_s):
            return 0.0 if total_s else math.inf
        start_rps, found = len(self._sample) / total_s, math.inf
        for _ in self._prices:
            found = min(found, self._run_rps_by(place, start_rps, attainment, every_tier))
            below = found * (1.0 - _PRECISION) if found < math.inf else start_rps * 2.0**_MOST_DOUBLINGS
            others = range(len(self._prices))
            stricter = [i for i in others if not self._attainable(below, attainment, every_tier, i)]
            if not stricter or place in stricter:
                break
            place = stricter[0]
        return found

    def attainable(self, rate_rps: float, attainment: float, *, every_tier: bool = False) -> bool:
        """Whether these requests, offered at `rate_rps`, could have this attainment. False is a proof."""
        return all(self._attainable(rate_rps, attainment, every_tier, place) for place in range(len(self._prices)))

    def most_attained(self, rate_rps: float) -> float:
        """The greatest share of requests that can attain in the long run at a rate."""
        share = 1.0
        for costs in self._costs:
            needed = np.cumsum(np.sort(costs)) * (rate_rps / len(costs))
            share = min(share, float(np.searchsorted(needed, 1.0, side="right")) / len(costs))
        return share

    def tiers(self) -> tuple[TierCost, ...]:
        """The tiers, tight to loose."""
        _, place_of_price = self._strictest(0.9, every_tier=False)
        costs = self._costs[place_of_price] * self._engines
        kept = math.ceil(0.9 * len(costs) - 1e-9)
        dropped = np.zeros(len(costs), dtype=np.bool_)
        dropped[np.argsort(costs, kind="stable")[kept:]] = True
        found = []
        for place, name in enumerate(self._sample.names):
            mine = self._sample.tiers == place
            own = costs[mine]
            served = own[np.isfinite(own)]
            found.append(
                TierCost(
                    name,
                    len(own),
                    float(served.mean()) if len(served) else math.inf,
                    1.0 - len(served) / len(own),
                    float(dropped[mine].mean()),
                )
            )
        return tuple(found)

    def _strictest(self, attainment: float, every_tier: bool) -> tuple[float, int]:
        """The greatest sum of costs by any price, in fleet-seconds, and which price that is."""
        totals = [self._total(costs, attainment, every_tier) for costs in self._costs]
        best = int(np.argmax(totals))
        return totals[best], best

    def _total(self, costs: Floats, attainment: float, every_tier: bool) -> float:
        """The sum of the cheapest costs that make up the attainment."""
        if not every_tier:
            return _cheapest(costs, attainment)
        return sum(
            _cheapest(costs[self._sample.tiers == place], attainment) for place in range(len(self._sample.names))
        )

    def _attainable(self, rate_rps: float, attainment: float, every_tier: bool, place: int) -> bool:
        sample = self._sample
        start_s = (sample.start_s - sample.start_s.min()) * (self._rate_rps / rate_rps)
        last_s = float(start_s.max())
        windows = sample.windows_s(sample.tokens)
        finite = windows[np.isfinite(windows)]
        drains = np.quantile(finite, _DRAIN_PARTS) if len(finite) else np.zeros(1)
        for drain_s in drains.tolist():
            now_s = last_s + drain_s
            costs = self._prices[place].of(sample, sample.due(now_s, start_s))
            if self._total(costs, attainment, every_tier) > now_s:
                return False
        return True

    def _run_rps_by(self, place: int, long_run_rps: float, attainment: float, every_tier: bool) -> float:
        low = long_run_rps
        while not self._attainable(low, attainment, every_tier, place):
            low /= 2.0
        high = 2.0 * low
        for _ in range(_MOST_DOUBLINGS):
            if not self._attainable(high, attainment, every_tier, place):
                break
            low, high = high, 2.0 * high
        else:
            return math.inf
        while high > low * (1.0 + _PRECISION / 2):
            middle = math.sqrt(low * high)
            if self._attainable(middle, attainment, every_tier, place):
                low = middle
            else:
                high = middle
        return high


def upper_bound(
    requests: Sequence[SimRequest],
    engines: Sequence[EngineKind],
    *,
    rate_rps: float | None = None,
    prefix_caching: bool = False,
    prefill_backends: int | None = None,
) -> Bound:
    """The bound for a fleet and the very requests it is offered (same trace, tiers and seed as the run).

    Args:
        requests: all of them, in order of arrival; those that are not measured only fill prefix caches.
        engines: the fleet, faults left out (they only slow it down).
        rate_rps: the rate that the arrivals were made for; None takes it from the arrivals.
        prefill_backends: of a fleet of equal engines, how many only prefill while the others only decode; None
            holds for every division of labour.

    Raises:
        ValueError: no request counts, no engine, or a division of roles between unequal engines.
    """
    counts = [kind.count for kind in engines]
    if not engines or min(counts) < 1:
        raise ValueError("engines: at least one of each kind is needed")
    if prefill_backends is not None and not (len(engines) == 1 and 0 < prefill_backends < counts[0]):
        raise ValueError(
            f"prefill_backends: {prefill_backends} of {sum(counts)} engines: some must prefill and some decode, "
            "and all must be of one kind"
        )
    sample = Sample.of(requests, prefix_caching=prefix_caching)
    if rate_rps is None:
        span_s = requests[-1].request.arrival_s - requests[0].request.arrival_s
        rate_rps = len(requests) / span_s if span_s > 0 else 1.0
    longest = max(sim.request.prompt_tokens + sim.output_tokens for sim in requests)
    families = [_family(kind, sample, longest, prefix_caching) for kind in engines]
    prices: list[Price] = []
    for minorants in zip(*families, strict=True):
        price = balanced(minorants, counts, sample)
        if price is not None:
            prices.append(price)
        if prefill_backends is not None:
            (minorant,) = minorants
            prices.append(Price(((1.0 / prefill_backends, minorant),), Phase.PREFILL))
            prices.append(Price(((1.0 / (counts[0] - prefill_backends), minorant),), Phase.DECODE))
    if not prices:  # nobody can be served by anything: the costs say so
        prices.append(Price(((1.0 / sum(counts), families[0][0]),)))
    return Bound(sample, prices, rate_rps, sum(counts))


def check_not_above(bound: Bound, rate_rps: float, attainment: float, *, every_tier: bool = False) -> None:
    """Check what a run of these very requests measured: its rate and attainment (of the worst tier: `every_tier`).

    Raises BoundExceededError when no schedule could have done it.
    """
    if bound.attainable(rate_rps, attainment, every_tier=every_tier):
        return
    ceiling = bound.ceiling(attainment, every_tier=every_tier)
    goal = f"{attainment:.1%} of {'every tier' if every_tier else 'all requests'}"
    raise BoundExceededError(
        f"{goal} attained at {rate_rps:g} requests/s, but no schedule can do that above {ceiling.run_rps:g} "
        f"in this run ({ceiling.long_run_rps:g} in the long run)"
    )


def _cheapest(costs: Floats, share: float) -> float:
    """The sum of the cheapest `share` of the costs."""
    kept = min(math.ceil(share * len(costs) - 1e-9), len(costs))
    if kept <= 0:
        return 0.0
    if kept == len(costs):
        return float(costs.sum())
    return float(np.partition(costs, kept - 1)[:kept].sum())


def _family(kind: EngineKind, sample: Sample, longest: int, prefix_caching: bool) -> list[Minorant]:
    """Minorants that are tight where such requests keep an engine busiest, each at another size of step."""
    steps = Range.of(kind.limits, longest, prefix_caching=prefix_caching)
    minorants = Minorants(kind.step_time, steps)
    groups, full = _targets(kind.step_time, sample, steps)
    found = [minorants.tight_at(group) for group in groups]
    found.extend(minorants.tight_at([step], fixed=False) for step in full)
    return [minorant.with_host(kind.host_step_s, kind.host_seq_s) for minorant in dict.fromkeys(found)]


def _targets(step_time: StepTime, sample: Sample, steps: Range) -> tuple[list[list[Step]], list[Step]]:
    """Groups of steps in the proportions of the sample, mixed and pure, as long as each pace; and full ones."""
    decodes = float(np.maximum(sample.tokens - 1.0, 0.0).mean())
    contexts = sample.prompts + sample.tokens / 2
    weights = np.maximum(sample.tokens - 1.0, 0.0)
    context = float((contexts * weights).sum() / weights.sum()) if weights.sum() else 0.0
    prefill = float(sample.computed.mean())
    pairs = float(sample.pairs.sum() / sample.computed.sum())
    per = (prefill, decodes, context, pairs)
    paces = np.unique(sample.tpot_s[np.isfinite(sample.tpot_s)]).tolist()
    # A step of one request's tokens, times x: the greatest x within the limits, and those that last a pace.
    most = min(
        steps.prefill_tokens / prefill,
        steps.seqs / decodes if decodes else math.inf,
        steps.kv_tokens / (decodes * context) if decodes else math.inf,
    )
    sizes = {_size_of(step_time, per, pace_s, most) for pace_s in paces} | {most}
    groups = [[_step(per, scale * size) for scale in _SCALES if scale * size <= most] for size in sorted(sizes)]
    only_prefill = [_step((prefill, 0.0, 0.0, pairs), x) for x in (most / 2, most, steps.prefill_tokens / prefill)]
    groups.append(only_prefill)
    fullest = [_step(per, most), only_prefill[-1]]
    if decodes:
        full = min(steps.seqs, steps.kv_tokens / context)
        sizes = {_size_of(step_time, (0.0, 1.0, context, 0.0), pace_s, full) for pace_s in paces} | {full}
        for size in sorted(sizes):
            pure = [_step((0.0, 1.0, context, 0.0), scale * size) for scale in _SCALES if scale * size <= full]
            groups.extend([pure, pure + only_prefill])
        fullest.append(_step((0.0, 1.0, context, 0.0), full))
    kept = ([step for step in group if step.tokens] for group in groups)
    return [group for group in kept if group], [step for step in fullest if step.tokens]


def _step(per: tuple[float, float, float, float], size: float) -> Step:
    prefill, decodes, context, pairs = (per[0] * size, per[1] * size, per[2], per[3])
    tokens, seqs = round(prefill), round(decodes)
    return Step(tokens, 1 if tokens else 0, 0, tokens * pairs, seqs, round(seqs * context))


def _size_of(step_time: StepTime, per: tuple[float, float, float, float], pace_s: float, most: float) -> float:
    """The size of a step that lasts `pace_s`, at most `most`."""
    low, high = 0.0, most
    for _ in range(20):
        middle = (low + high) / 2
        if step_time.seconds(_step(per, middle)) <= pace_s:
            low = middle
        else:
            high = middle
    return low


__all__ = [
    "Bound",
    "BoundExceededError",
    "Ceiling",
    "EngineKind",
    "TierCost",
    "check_not_above",
    "upper_bound",
]
