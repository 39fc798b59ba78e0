"""Numbers of several processes put together."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tiergate.workers.metrics import Scrape, Told

_TEXT = """\
# HELP tiergate_build_info Version
# TYPE tiergate_build_info gauge
tiergate_build_info{{version="0.1.0"}} 1.0
# HELP tiergate_requests_arrived_total Requests that arrived
# TYPE tiergate_requests_arrived_total counter
tiergate_requests_arrived_total {arrived}
# HELP tiergate_errors_total Error answers by code
# TYPE tiergate_errors_total counter
tiergate_errors_total{{code="a \\"quoted\\" one"}} {errors}
# HELP tiergate_requests_running Requests on an engine
# TYPE tiergate_requests_running gauge
tiergate_requests_running {running}
# HELP tiergate_loop_lag_seconds How late the last tick was
# TYPE tiergate_loop_lag_seconds gauge
tiergate_loop_lag_seconds {lag}
# HELP tiergate_queue_seconds Time until placed
# TYPE tiergate_queue_seconds histogram
tiergate_queue_seconds_bucket{{tier="chat",le="0.1"}} {fast}
tiergate_queue_seconds_bucket{{tier="chat",le="+Inf"}} {arrived}
tiergate_queue_seconds_count{{tier="chat"}} {arrived}
tiergate_queue_seconds_sum{{tier="chat"}} 0.5
"""


def _text(arrived: int, *, errors: int = 0, running: int = 0, lag: float = 0.0, fast: int = 0) -> str:
    return _TEXT.format(arrived=arrived, errors=errors, running=running, lag=lag, fast=fast)


def _told(worker: str, text: str | None, *, fresh: bool = True, leads: bool = True, connections: int = 0) -> Told:
    return Told(worker, text, fresh, leads, connections)


def _samples(scrape: Scrape, *workers: Told) -> dict[str, float]:
    """Every sample by its name and labels, as Prometheus would read it."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(scrape.text(workers).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}"
            assert key not in found, f"{key} is told twice"
            found[key] = sample.value
    return found


def test_counters_histograms_and_what_each_carries_are_summed() -> None:
    one = _text(10, errors=1, running=3, lag=0.1, fast=7)
    two = _text(20, errors=2, running=4, lag=0.2, fast=11)
    samples = _samples(Scrape(), _told("0", one, connections=5), _told("1", two, connections=6))
    assert samples["tiergate_requests_arrived_total{}"] == 30
    assert samples['tiergate_errors_total{code=a "quoted" one}'] == 3
    assert samples["tiergate_requests_running{}"] == 7
    assert samples["tiergate_queue_seconds_bucket{le=0.1,tier=chat}"] == 18
    assert samples["tiergate_queue_seconds_bucket{le=+Inf,tier=chat}"] == 30
    assert samples["tiergate_queue_seconds_count{tier=chat}"] == 30
    assert samples["tiergate_queue_seconds_sum{tier=chat}"] == 1.0
    assert samples["tiergate_worker_requests_total{worker=1}"] == 20
    assert samples["tiergate_worker_connections{worker=1}"] == 6


def test_other_gauges_are_told_for_each_worker() -> None:
    samples = _samples(Scrape(), _told("0", _text(0, lag=0.1)), _told("1", _text(0, lag=0.2)))
    assert samples["tiergate_loop_lag_seconds{worker=0}"] == 0.1
    assert samples["tiergate_loop_lag_seconds{worker=1}"] == 0.2
    assert samples["tiergate_build_info{version=0.1.0,worker=1}"] == 1
    assert "tiergate_loop_lag_seconds{}" not in samples


def test_what_an_ended_worker_counted_stays_and_what_it_carried_goes() -> None:
    scrape = Scrape()
    before = _samples(scrape, _told("0", _text(10, running=3)), _told("1", _text(20, running=4)))
    scrape.ended("0", _text(12, running=3))
    scrape.restarts += 1
    samples = _samples(scrape, _told("0", _text(1, running=1)), _told("1", _text(20, running=4)))
    assert before["tiergate_requests_arrived_total{}"] == 30
    assert samples["tiergate_requests_arrived_total{}"] == 33
    assert samples["tiergate_worker_requests_total{worker=0}"] == 13
    assert samples["tiergate_requests_running{}"] == 5
    assert samples["tiergate_queue_seconds_count{tier=chat}"] == 33
    assert samples["tiergate_worker_restarts_total{}"] == 1


def test_a_worker_on_its_way_out_counts_beside_its_replacement() -> None:
    old = _told("0", _text(10, running=2, lag=0.5), leads=False, connections=2)
    new = _told("0", _text(1, running=1, lag=0.1), connections=3)
    samples = _samples(Scrape(), old, new)
    assert samples["tiergate_requests_arrived_total{}"] == 11
    assert samples["tiergate_requests_running{}"] == 3
    assert samples["tiergate_loop_lag_seconds{worker=0}"] == 0.1
    assert samples["tiergate_worker_connections{worker=0}"] == 5
    assert samples["tiergate_worker_up{worker=0}"] == 1


def test_a_worker_that_does_not_answer_is_down_and_its_counters_do_not_fall() -> None:
    silent = _told("1", _text(20, running=4, lag=0.2), fresh=False)
    samples = _samples(Scrape(), _told("0", _text(10, running=3)), silent)
    assert samples["tiergate_requests_arrived_total{}"] == 30
    assert samples["tiergate_requests_running{}"] == 3
    assert samples["tiergate_worker_up{worker=1}"] == 0
    assert "tiergate_loop_lag_seconds{worker=1}" not in samples


def test_a_worker_that_never_told_anything_is_down() -> None:
    samples = _samples(Scrape(), _told("0", None, fresh=False, leads=False))
    assert samples["tiergate_worker_up{worker=0}"] == 0
