"""One `/metrics` for several processes: their texts put together.

Counters and histograms are summed. So are the gauges that count what each process has of its own
(`gateway.telemetry.SUMMED_GAUGES`); every other gauge is told once a worker, with the label `worker`. What was
counted by a process that has ended stays in the sums: a counter that falls looks to Prometheus as if all had
started anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gateway.telemetry import SUMMED_GAUGES

_ADDED = frozenset({"counter", "histogram", "summary"})
_ARRIVED = "tiergate_requests_arrived_total"

_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Told:
    """One worker process and its `/metrics`.

    Attributes:
        worker: its name, which a replacement has as well while the two overlap.
        text: what it told last; None when it never told anything.
        fresh: it told that now. Else what it counted counts, and what it carries is not known.
        leads: it is the one that serves under that name, not one that is on its way out.
        connections: how many clients it has.
    """

    worker: str
    text: str | None
    fresh: bool
    leads: bool
    connections: int


@dataclass(slots=True)
class _Family:
    kind: str
    text: str
    values: dict[_Key, float]

    def metric(self, name: str) -> Metric:
        made = Metric(name, self.text, self.kind)
        for (sample, labels), value in self.values.items():
            made.add_sample(sample, dict(labels), value)
        return made


class Sums:
    """Families added up, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, text: str, worker: str | None, *, lasting_only: bool = False) -> None:
        """Add one process's numbers. Gauges that are not summed are left out without a `worker`; `lasting_only`
        leaves out every gauge, for a process that has ended. Raises ValueError for a text that is none."""
        for metric in text_string_to_metric_families(text):
            added = metric.type in _ADDED or (metric.name in SUMMED_GAUGES and not lasting_only)
            if not added and (worker is None or lasting_only):
                continue
            family = self._families.get(metric.name)
            if family is None:
                family = self._families[metric.name] = _Family(metric.type, metric.documentation, {})
            own = () if added or worker is None else (("worker", worker),)
            values = family.values
            for sample in metric.samples:
                key = sample.name, (*sample.labels.items(), *own)
                values[key] = values.get(key, 0.0) + sample.value

    def add_all(self, other: Sums) -> None:
        """Add what was added up elsewhere."""
        for name, theirs in other._families.items():
            family = self._families.get(name)
            if family is None:
                family = self._families[name] = _Family(theirs.kind, theirs.text, {})
            for key, value in theirs.values.items():
                family.values[key] = family.values.get(key, 0.0) + value

    def value(self, sample: str) -> float:
        """A sample without labels; 0 when it is not there."""
        return sum(family.values.get((sample, ()), 0.0) for family in self._families.values())

    def metrics(self) -> Iterator[Metric]:
        """The families as they are exposed."""
        for name, family in self._families.items():
            yield family.metric(name)


class Scrape:
    """What all workers count together, those that have ended included. One per supervisor."""

    def __init__(self) -> None:
        self._gone = Sums()
        self._arrived: dict[str, float] = {}  # by worker, at those that have ended
        self.restarts = 0

    def ended(self, worker: str, text: str | None) -> None:
        """A worker has ended; `text` is the last that it told. Raises ValueError for a text that is none."""
        if text is not None:
            own = Sums()
            own.add(text, None, lasting_only=True)
            self._gone.add_all(own)
            self._arrived[worker] = self._arrived.get(worker, 0.0) + own.value(_ARRIVED)

    def text(self, workers: Sequence[Told]) -> bytes:
        """All together. Raises ValueError for a text that is none."""
        sums = Sums()
        arrived = dict(self._arrived)
        for one in workers:
            if one.text is not None:
                own = Sums()
                own.add(one.text, one.worker if one.fresh and one.leads else None, lasting_only=not one.fresh)
                sums.add_all(own)
                arrived[one.worker] = arrived.get(one.worker, 0.0) + own.value(_ARRIVED)
        sums.add_all(self._gone)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged([*sums.metrics(), *self._about(workers, arrived)]))
        return generate_latest(registry)

    def _about(self, workers: Sequence[Told], arrived: Mapping[str, float]) -> Iterator[Metric]:
        up: dict[str, int] = {}
        connections: dict[str, int] = {}
        for one in workers:
            up[one.worker] = up.get(one.worker, 0) | (one.leads and one.fresh)
            connections[one.worker] = connections.get(one.worker, 0) + one.connections
        labels = ["worker"]
        serving = GaugeMetricFamily("tiergate_worker_up", "1 when it serves and answers", labels=labels)
        clients = GaugeMetricFamily("tiergate_worker_connections", "Connections of clients", labels=labels)
        requests = CounterMetricFamily("tiergate_worker_requests", "Requests that arrived at it", labels=labels)
        for name in sorted(up):
            serving.add_metric([name], up[name])
            clients.add_metric([name], connections[name])
        for name in sorted(arrived):
            requests.add_metric([name], arrived[name])
        yield from (serving, clients, requests)
        yield CounterMetricFamily(
            "tiergate_worker_restarts", "Workers that ended by themselves and were replaced", value=self.restarts
        )


class _Merged(Collector):
    """Families that were made before."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
