"""Every number the gateway tells, and every name it tells it by.

The hot path only adds to plain counters; the text is made when somebody scrapes.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gateway.dispatch import Shell
from scheduling.decisions import Decision, Outcome
from scheduling.events import EndKind
from scheduling.requests import Request
from scheduling.scoring import DeadlineMeter, RequestEnd, TierCounter, judge_meter
from state.contract import Mode

log = logging.getLogger("tiergate.store")

TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TPOT_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
QUEUE_BUCKETS_S = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)

# Of several processes on one port, these gauges are added up; any other is told for each of them.
SUMMED_GAUGES = frozenset(
    {
        "tiergate_requests_held",
        "tiergate_requests_running",
        "tiergate_backend_decodes",
        "tiergate_backend_peak_kv_tokens",
        "tiergate_backend_queued_prefill_tokens",
        "tiergate_backend_promoted",
    }
)


class Histogram:
    """Counts in fixed buckets: one bisection an observation."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def total(self) -> int:
        return sum(self._counts)

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        running = 0
        made: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            running += count
            made.append((bound, running))
        return made

    def quantile(self, fraction: float) -> float | None:
        """The upper bound of the bucket in which the quantile lies; None without observations."""
        total = self.total
        if not total:
            return None
        running = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            running += count
            if running >= fraction * total:
                return bound
        return float("inf")


@dataclass(frozen=True, slots=True)
class BackendNumbers:
    """One backend at scrape time."""

    name: str
    tier: str | None
    up: bool
    calibrated: bool
    load: float | None
    decodes: int
    peak_kv_tokens: int
    queued_prefill_tokens: int
    promoted: int
    driven: bool = False


class FleetNumbers(Protocol):
    def numbers(self) -> list[BackendNumbers]: ...

    @property
    def store_mode(self) -> Mode: ...

    @property
    def replicas(self) -> int: ...


class _TierNumbers:
    __slots__ = ("counter", "queue_s", "tpot_s", "ttft_s")

    def __init__(self) -> None:
        self.counter = TierCounter()
        self.ttft_s = Histogram(TTFT_BUCKETS_S)
        self.tpot_s = Histogram(TPOT_BUCKETS_S)
        self.queue_s = Histogram(QUEUE_BUCKETS_S)


def log_mode(mode: Mode, why: str) -> None:
    """One line for a change of how this replica stands with the shared state."""
    if mode is Mode.ALONE:
        log.warning("store: alone (%s): requests are admitted within this replica's own share", why)
    else:
        log.info("store: %s (%s)", mode.value, why)


class Telemetry:
    """What happened so far. One per gateway."""

    def __init__(self) -> None:
        self.tiers: dict[str, _TierNumbers] = {}
        self.outcomes: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        self.ttft_error = Histogram(ERROR_BUCKETS)
        self.tpot_error = Histogram(ERROR_BUCKETS)
        self.prompt_tokens = 0
        self.merged_streams = 0
        self.merged_tokens = 0
        self.lost_log_lines = 0
        self.policy_version = 0
        self.policy_refused_version = 0
        self.policies_refused = 0
        self.control: dict[tuple[str, ...], float] = {}  # changes by backend and rung

    def tier(self, name: str) -> _TierNumbers:
        found = self.tiers.get(name)
        if found is None:
            found = self.tiers[name] = _TierNumbers()
        return found

    def decided(self, decision: Decision, tier: str, queue_s: float) -> None:
        """A request got its place."""
        key = decision.outcome.value
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.tier(tier).queue_s.add(queue_s)

    def refused(self, request: Request, reason: str) -> None:
        """A request was turned away: it counts as missed."""
        key = Outcome.REFUSED.value
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self._judge(request, DeadlineMeter(request.slo, request.arrival_s), RequestEnd.REFUSED, request.arrival_s)

    def merged(self, tokens: int) -> None:
        """A stream ended in which `tokens` tokens came in events of others."""
        self.merged_streams += 1
        self.merged_tokens += tokens

    def log_lost(self, lines: int) -> None:
        """The request log lost so many lines."""
        self.lost_log_lines += lines

    def control_changed(self, backend: str, rung: str) -> None:
        """The controller decided something else about a backend."""
        self.control[backend, rung] = self.control.get((backend, rung), 0) + 1

    def failed_request(self, code: str) -> None:
        """An answer other than success, whatever made it."""
        self.errors[code] = self.errors.get(code, 0) + 1

    def ended(
        self,
        request: Request,
        meter: DeadlineMeter,
        kind: EndKind,
        now_s: float,
        predicted: tuple[float | None, float | None],
    ) -> bool | None:
        """A request left its engine; whether it attained, None without a promise or when its client left."""
        if kind is EndKind.CANCELLED:
            return None
        self.prompt_tokens += request.prompt_tokens * request.sequences
        tier = self.tier(request.tier)
        if request.streamed and meter.tokens:
            ttft_s = meter.first_s - request.arrival_s
            tpot_s = meter.mean_tpot_s
            tier.ttft_s.add(ttft_s)
            if tpot_s is not None and meter.tokens > 2:
                tpot_s *= request.sequences
                tier.tpot_s.add(tpot_s)
                _add_error(self.tpot_error, predicted[1], tpot_s)
            _add_error(self.ttft_error, predicted[0], ttft_s)
        end = RequestEnd.FINISHED if kind is EndKind.FINISHED else RequestEnd.FAILED
        return self._judge(request, meter, end, now_s)

    def _judge(self, request: Request, meter: DeadlineMeter, end: RequestEnd, ended_s: float) -> bool | None:
        judgement = judge_meter(
            meter, request.slo, request.arrival_s, end, ended_s=ended_s, streamed=request.streamed
        )
        self.tier(request.tier).counter.add(end, judgement)
        return judgement.attained if judgement.promised else None


def _add_error(histogram: Histogram, predicted: float | None, actual: float) -> None:
    if predicted is not None and actual > 0:
        histogram.add(abs(predicted - actual) / actual)


class _GatewayCollector(Collector):
    """Makes the metric families from the counters, at scrape time."""

    def __init__(self, telemetry: Telemetry, shell: Shell, fleet: FleetNumbers, version: str) -> None:
        self._telemetry = telemetry
        self._shell = shell
        self._fleet = fleet
        self._version = version

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("tiergate_build", "Version", value={"version": self._version})
        yield from self._requests()
        yield from self._tiers()
        yield from self._backends()

    def _requests(self) -> Iterator[Metric]:
        telemetry, shell = self._telemetry, self._shell
        counts = shell.counts
        ends = {
            "finished": counts.finished,
            "failed": counts.failed,
            "refused": counts.refused,
            "cancelled": counts.cancelled,
        }
        yield _counter("tiergate_requests_arrived", "Requests that arrived", {(): counts.arrived}, ())
        yield _counter("tiergate_requests_ended", "Requests by end", _keyed(ends), ("end",))
        yield _counter("tiergate_requests_retried", "Opens retried elsewhere", {(): counts.retried}, ())
        yield _gauge("tiergate_requests_held", "Requests without an open stream", {(): shell.held}, ())
        yield _gauge("tiergate_requests_running", "Requests on an engine", {(): shell.running}, ())
        yield _counter("tiergate_output_tokens", "Tokens passed on", {(): counts.tokens}, ())
        yield _counter(
            "tiergate_prompt_tokens", "Prompt tokens of ended requests", {(): telemetry.prompt_tokens}, ()
        )
        yield _counter(
            "tiergate_merged_streams",
            "Streams whose events carried several tokens",
            {(): telemetry.merged_streams},
            (),
        )
        yield _counter(
            "tiergate_merged_tokens",
            "Tokens that came in events of others",
            {(): telemetry.merged_tokens},
            (),
        )
        yield _counter(
            "tiergate_request_log_lost_lines",
            "Lines of the request log that were not written",
            {(): telemetry.lost_log_lines},
            (),
        )
        yield from self._policy()
        yield _counter("tiergate_decisions", "Decisions by outcome", _keyed(telemetry.outcomes), ("outcome",))
        yield _counter("tiergate_refusals", "Refusals by reason", _keyed(telemetry.refusals), ("reason",))
        yield _counter("tiergate_errors", "Error answers by code", _keyed(telemetry.errors), ("code",))
        yield _gauge("tiergate_loop_lag_seconds", "How late the last tick was", {(): shell.loop_lag_s}, ())
        yield _gauge("tiergate_loop_lag_max_seconds", "The latest tick", {(): shell.loop_lag_max_s}, ())
        yield from self._store()
        for name, text, histogram in (
            ("tiergate_ttft_prediction_error_ratio", "Relative error of predicted TTFT", telemetry.ttft_error),
            ("tiergate_tpot_prediction_error_ratio", "Relative error of predicted TPOT", telemetry.tpot_error),
        ):
            family = HistogramMetricFamily(name, text)
            family.add_metric([], histogram.buckets(), histogram.sum)
            yield family

    def _policy(self) -> Iterator[Metric]:
        telemetry = self._telemetry
        for name, text, version in (
            ("tiergate_policy_version", "The policy in force; 0: the file's alone", telemetry.policy_version),
            (
                "tiergate_policy_refused_version",
                "The policy in the store that cannot be used here; 0: none",
                telemetry.policy_refused_version,
            ),
        ):
            yield _gauge(name, text, {(): version}, ())
        yield _counter(
            "tiergate_policies_refused",
            "Policies that could not be used here",
            {(): telemetry.policies_refused},
            (),
        )

    def _store(self) -> Iterator[Metric]:
        mode = self._fleet.store_mode
        down = self._shell.store_down or mode is Mode.ALONE
        yield _gauge("tiergate_store_down", "1 while the store does not answer", {(): int(down)}, ())
        yield _gauge(
            "tiergate_store_mode",
            "1 for the mode it is in: checked against all replicas, alone, or healing",
            {(each.value,): int(each is mode) for each in Mode},
            ("mode",),
        )
        yield _gauge("tiergate_replicas", "Live replicas, as far as is known", {(): self._fleet.replicas}, ())

    def _tiers(self) -> Iterator[Metric]:
        tiers = self._telemetry.tiers
        offered = CounterMetricFamily("tiergate_tier_offered", "Requests offered", labels=["tier"])
        promised = CounterMetricFamily("tiergate_tier_promised", "Requests with a promise", labels=["tier"])
        attained = CounterMetricFamily("tiergate_tier_attained", "Requests that attained", labels=["tier"])
        ttft = HistogramMetricFamily("tiergate_time_to_first_token_seconds", "TTFT", labels=["tier"])
        tpot = HistogramMetricFamily("tiergate_time_per_output_token_seconds", "Mean TPOT", labels=["tier"])
        queue = HistogramMetricFamily("tiergate_queue_seconds", "Time until placed", labels=["tier"])
        for name, numbers in tiers.items():
            offered.add_metric([name], numbers.counter.offered)
            promised.add_metric([name], numbers.counter.promised)
            attained.add_metric([name], numbers.counter.attained)
            ttft.add_metric([name], numbers.ttft_s.buckets(), numbers.ttft_s.sum)
            tpot.add_metric([name], numbers.tpot_s.buckets(), numbers.tpot_s.sum)
            queue.add_metric([name], numbers.queue_s.buckets(), numbers.queue_s.sum)
        yield from (offered, promised, attained, ttft, tpot, queue)

    def _backends(self) -> Iterator[Metric]:
        backends = self._fleet.numbers()
        labels = ("backend", "tier")
        keys = {backend.name: (backend.name, backend.tier or "") for backend in backends}
        yield _gauge(
            "tiergate_backend_up", "1 when it answers", {keys[b.name]: int(b.up) for b in backends}, labels
        )
        yield _gauge(
            "tiergate_backend_calibrated",
            "1 with a profile",
            {keys[b.name]: int(b.calibrated) for b in backends},
            labels,
        )
        yield _gauge(
            "tiergate_backend_load_ratio",
            "Predicted steady step time over host TPOT",
            {keys[b.name]: b.load for b in backends if b.load is not None},
            labels,
        )
        yield _gauge(
            "tiergate_backend_decodes", "Sequences it carries", {keys[b.name]: b.decodes for b in backends}, labels
        )
        yield _gauge(
            "tiergate_backend_peak_kv_tokens",
            "KV its residents need at their peak",
            {keys[b.name]: b.peak_kv_tokens for b in backends},
            labels,
        )
        yield _gauge(
            "tiergate_backend_queued_prefill_tokens",
            "Prompt tokens not yet answered",
            {keys[b.name]: b.queued_prefill_tokens for b in backends},
            labels,
        )
        yield _gauge(
            "tiergate_backend_driven",
            "1 while its steps are kept within its pace",
            {keys[b.name]: int(b.driven) for b in backends},
            labels,
        )
        yield _counter(
            "tiergate_control_decisions",
            "Changes of what a backend is set to, by how",
            self._telemetry.control,
            ("backend", "rung"),
        )
        yield _gauge(
            "tiergate_backend_promoted",
            "Looser requests it hosts",
            {keys[b.name]: b.promoted for b in backends},
            labels,
        )


def _keyed(counts: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(key,): value for key, value in counts.items()}


def _counter(
    name: str, text: str, values: Mapping[tuple[str, ...], float], labels: Iterable[str]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=list(labels))
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], float], labels: Iterable[str]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


class Exposition:
    """The text of `/metrics`, from a registry of its own."""

    def __init__(self, telemetry: Telemetry, shell: Shell, fleet: FleetNumbers, version: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_GatewayCollector(telemetry, shell, fleet, version))

    def text(self) -> bytes:
        return generate_latest(self._registry)
