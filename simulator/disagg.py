"""A disaggregated fleet: some engines prefill, others decode, and the KV is sent between them.

Each half is a `SimFleet` with dispatchers of its own, so the same code decides in both (PolyServe §4.2, where the
bins of a disaggregated fleet partition the decode servers). A request is two to them: one whose answer is its
first token, and one that comes with its KV and whose first token, the second to its client, is due at TTFT + TPOT.
Between them lie the transfer and, at worst, a whole step of the decode engine before the one that counts; so that
the second token can be on time (PolyServe §4.6), the first is asked for by so much earlier. An engine's KV leaves
it one request after the other, at the link's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scheduling.dispatcher import Dispatcher
from scheduling.requests import Request
from scheduling.tiers import OnMiss, Slo, Tier, TierSet
from simulator.agenda import Agenda
from simulator.engines import StreamTimes
from simulator.fleet import Arrivals, FleetOptions, SimFleet
from simulator.requests import SimRequest
from simulator.served import Served, SimResult
from tiergate_engine.model import EngineModel

PREFILL_TIER = "prefill"


def prefill_tiers(tiers: TierSet) -> TierSet:
    """The one tier of the prefill half: what counts there is the first token, not the pace."""
    longest_s = [tier.slo.ttft_s for tier in tiers.tiers if tier.slo.ttft_s is not None]
    on_miss = OnMiss.REFUSE if any(tier.on_miss is OnMiss.REFUSE for tier in tiers.tiers) else OnMiss.RELEGATE
    slo = Slo(max(longest_s, default=None), None)
    return TierSet((Tier(PREFILL_TIER, slo, 0, on_miss),), PREFILL_TIER)


@dataclass(frozen=True, slots=True)
class Half:
    """The dispatchers and engine makers of one half."""

    dispatchers: Sequence[Dispatcher]
    engines: Mapping[str, Callable[[], EngineModel]]
    options: FleetOptions


@dataclass(frozen=True, slots=True)
class Link:
    """What sends KV: bytes a second out of one prefill engine, and the size of a token."""

    bytes_per_s: float
    kv_bytes_per_token: int

    def seconds(self, tokens: int) -> float:
        return tokens * self.kv_bytes_per_token / self.bytes_per_s


class DisaggregatedFleet:
    """Run `run(requests)` once."""

    def __init__(self, prefill: Half, decode: Half, link: Link) -> None:
        self.agenda = Agenda()
        self.prefill = SimFleet(
            prefill.dispatchers, prefill.engines, prefill.options, self.agenda, self._prefilled
        )
        self.decode = SimFleet(
            decode.dispatchers, decode.engines, replace(decode.options, received=True), self.agenda, self._decoded
        )
        self.served: list[Served] = []
        self._link = link
        self._whole: dict[str, SimRequest] = {}
        self._first: dict[str, Served] = {}
        self._free_s = dict.fromkeys(prefill.engines, 0.0)  # when each engine's link is
        self._unended_measured = 0

    def run(self, requests: Iterable[SimRequest], on_event: Callable[[], None] | None = None) -> SimResult:
        """See `SimFleet.run`."""
        arrivals = Arrivals(self.agenda, iter(requests), self._arrive)
        while (arrivals.coming or self._unended_measured) and self.agenda.run_next():
            if on_event is not None:
                on_event()
        halves = (self.prefill.result(), self.decode.result())
        return SimResult(
            served=tuple(self.served),
            backend_seconds=self.backend_seconds(),
            busy_s=self.busy_s(),
            preemptions=sum(half.preemptions for half in halves),
            ended_s=self.agenda.now_s,
            samples=halves[1].samples,
            decision_s=halves[0].decision_s + halves[1].decision_s,
        )

    def backend_seconds(self) -> float:
        """Time that backends of both halves spent in a tier so far."""
        return self.prefill.backend_seconds() + self.decode.backend_seconds()

    def busy_s(self) -> float:
        """Time that engines of both halves spent in steps so far."""
        return self.prefill.busy_s() + self.decode.busy_s()

    def _arrive(self, sim: SimRequest) -> None:
        request = sim.request
        self._whole[request.request_id] = sim
        self._unended_measured += sim.measured
        due_s = request.slo.ttft_s if sim.output_tokens == 1 else self._prefill_due_s(request)
        first = replace(request, tier=PREFILL_TIER, slo=Slo(due_s, None), max_output_tokens=1)
        self.prefill.arrive(replace(sim, request=first, output_tokens=1))

    def _prefill_due_s(self, request: Request) -> float | None:
        """What the prefill half promises, so that the decode half can keep its part."""
        ttft_s, tpot_s = request.slo.ttft_s, request.slo.tpot_s
        if ttft_s is None or tpot_s is None:
            return ttft_s
        after_s = self._link.seconds(request.prompt_tokens) + tpot_s
        return max(ttft_s - after_s, ttft_s / 4)

    def _prefilled(self, served: Served) -> None:
        whole = self._whole[served.sim.request.request_id]
        if served.times is None or whole.output_tokens == 1:
            self._end(replace(served, sim=whole))
            return
        request = whole.request
        self._first[request.request_id] = served
        engine = served.backend or ""
        sent_s = max(self._free_s[engine], self.agenda.now_s) + self._link.seconds(request.prompt_tokens)
        self._free_s[engine] = sent_s
        slo = request.slo
        # without a pace, nothing behind the first token is due
        second_s = None if slo.ttft_s is None or slo.tpot_s is None else slo.ttft_s + slo.tpot_s
        asked = replace(request, slo=Slo(second_s, slo.tpot_s), cached_tokens=request.prompt_tokens)
        if request.expected_output_tokens is not None:
            asked = replace(asked, expected_output_tokens=max(request.expected_output_tokens - 1, 1))
        rest = replace(whole, request=asked, output_tokens=whole.output_tokens - 1, prefix_blocks=())
        self.agenda.at(sent_s, lambda: self.decode.arrive(rest))

    def _decoded(self, served: Served) -> None:
        request_id = served.sim.request.request_id
        first, whole = self._first.pop(request_id), self._whole[request_id]
        times, request = served.times, whole.request
        if times is not None and first.times is not None:
            slack_s = times.slack_s
            if request.slo.ttft_s is not None and first.times.first_s is not None:
                first_slack_s = request.slo.deadline_s(request.arrival_s, 0) - first.times.first_s
                slack_s = first_slack_s if slack_s is None else min(slack_s, first_slack_s)
            times = StreamTimes(times.tokens + 1, first.times.first_s, times.last_s, slack_s)
        self._end(
            replace(
                served,
                sim=whole,
                times=times,
                reason=None if served.reason is None else f"decode: {served.reason}",
                predicted_ttft_s=first.predicted_ttft_s,
            )
        )

    def _end(self, served: Served) -> None:
        del self._whole[served.sim.request.request_id]
        self._unended_measured -= served.sim.measured
        self.served.append(served)
