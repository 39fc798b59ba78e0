"""The emulated engine's /metrics: vLLM's names and labels, and the emulation's own lateness."""

from __future__ import annotations

from adapters.emulated.driver import EngineDriver
from adapters.emulated.lag import LoopLag
from adapters.emulated.settings import VERSION, EmulatedSettings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(settings: EmulatedSettings, driver: EngineDriver, lag: LoopLag | None) -> bytes:
    """All metrics in Prometheus' text format."""
    page = _Page(f'engine="0",model_name="{_escape(settings.model)}"')
    _engine(page, settings, driver)
    _requests(page, driver)
    _emulation(page, settings, driver)
    if lag is not None:
        name = "tiergate_emulated_event_loop_lag_seconds"
        page.head(name, "histogram", "How late the process's event loop is, whatever the engines do.")
        page.add(*lag.lateness.lines(name, page.labels))
    return page.bytes()


class _Page:
    def __init__(self, labels: str) -> None:
        self.labels = labels
        self._lines: list[str] = []

    def head(self, name: str, kind: str, what: str) -> None:
        self._lines += (f"# HELP {name} {what}", f"# TYPE {name} {kind}")

    def add(self, *lines: str) -> None:
        self._lines += lines

    def gauge(self, name: str, what: str, value: float) -> None:
        self.head(name, "gauge", what)
        self.add(f"{name}{{{self.labels}}} {float(value)!r}")

    def counter(self, name: str, what: str, value: float) -> None:
        self.head(name, "counter", what)
        self.add(f"{name}{{{self.labels}}} {float(value)!r}")

    def bytes(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _engine(page: _Page, settings: EmulatedSettings, driver: EngineDriver) -> None:
    model, config = driver.model, settings.engine
    page.gauge("vllm:num_requests_running", "Number of requests in model execution batches.", model.running)
    page.gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.", model.waiting)
    page.gauge(
        "vllm:kv_cache_usage_perc",
        "KV-cache usage. 1 means 100 percent usage.",
        model.kv_used_tokens / model.kv_capacity_tokens,
    )
    page.counter(
        "vllm:num_preemptions_total", "Cumulative number of preemption from the engine.", model.preemptions
    )
    blocks = model.kv_capacity_tokens // config.block_tokens
    caching = str(config.prefix_caching)
    page.head("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig")
    page.add(
        f'vllm:cache_config_info{{block_size="{config.block_tokens}",cache_dtype="auto",'
        f'enable_prefix_caching="{caching}",engine="0",num_gpu_blocks="{blocks}"}} 1.0'
    )


def _requests(page: _Page, driver: EngineDriver) -> None:
    stats = driver.stats
    page.counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.", stats.prompt_tokens)
    page.counter("vllm:generation_tokens_total", "Number of generation tokens processed.", stats.generation_tokens)
    page.head("vllm:request_success_total", "counter", "Count of successfully processed requests.")
    for reason, count in (
        ("stop", stats.finished_stop),
        ("length", stats.finished_length),
        ("abort", stats.aborted),
        ("error", 0),
    ):
        page.add(f'vllm:request_success_total{{{page.labels},finished_reason="{reason}"}} {float(count)!r}')
    page.head(
        "vllm:admission_rejections_total",
        "counter",
        "Number of admission attempts rejected by a queue limit, by reason.",
    )
    model_name = page.labels.partition(",")[2]
    page.add(
        f'vllm:admission_rejections_total{{{model_name},reason="max_num_queued_reqs"}} {float(stats.rejected)!r}'
    )
    for name, what, histogram in (
        ("vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.", stats.ttft),
        ("vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", stats.itl),
        (
            "vllm:request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            stats.time_per_token,
        ),
        ("vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", stats.e2e),
        ("vllm:iteration_tokens_total", "Histogram of number of tokens per engine_step.", stats.step_tokens),
    ):
        page.head(name, "histogram", what)
        page.add(*histogram.lines(name, page.labels))


def _emulation(page: _Page, settings: EmulatedSettings, driver: EngineDriver) -> None:
    stats = driver.stats
    page.head(
        "tiergate_emulated_info", "gauge", "This engine is emulated: no model runs; times come from a profile."
    )
    page.add(
        f'tiergate_emulated_info{{{page.labels},profile="{_escape(settings.profile)}",version="{VERSION}"}} 1.0'
    )
    name = "tiergate_emulated_step_lateness_seconds"
    page.head(name, "histogram", "How long after its scheduled end a step's tokens were handed out.")
    page.add(*stats.lateness.lines(name, page.labels))
    page.gauge(
        "tiergate_emulated_step_lateness_worst_seconds",
        "The latest step since the start.",
        stats.worst_lateness_s,
    )
    page.counter(
        "tiergate_emulated_schedule_resyncs_total",
        "Times the process was so late that the schedule was started again.",
        stats.resyncs,
    )
    page.counter("tiergate_emulated_steps_total", "Engine steps.", driver.model.steps)
    page.counter("tiergate_emulated_step_seconds_total", "Emulated time spent in steps.", stats.busy_s)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
