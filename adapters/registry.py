"""Adapters by name, and finding out which one an endpoint wants."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.contract import Adapter, Support, UpstreamError
from adapters.exchange import NO_ANSWER, Answer, ask
from adapters.http import HttpOptions, HttpUpstream
from adapters.models import ModelList
from adapters.openai import OpenAIAdapter
from adapters.sglang import SglangAdapter
from adapters.tgi import TgiAdapter, is_tgi
from adapters.vllm import VllmAdapter

KINDS = ("vllm", "sglang", "tgi", "openai")
_BY_OWNER = {"vllm": "vllm", "tiergate-emulated": "vllm", "sglang": "sglang"}
_BY_METRICS = {"vllm": b"\nvllm:", "sglang": b"\nsglang:"}

_SCHEDULE_BY_PRIORITY = {"vllm": VllmAdapter, "sglang": SglangAdapter}


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """What configuration may say of a backend's endpoint.

    Attributes:
        api_key: sent to the engine instead of the client's Authorization; None forwards the client's.
        priority: whether the engine schedules by priority, where it is known; UNKNOWN is probed.
        adds_usage: whether a generic OpenAI server may be asked for a usage event with ``stream_options``.
        probe_timeout_s: to the head of each answer while probing, and for the small questions later.
    """

    api_key: str | None = None
    priority: Support = Support.UNKNOWN
    adds_usage: bool = True
    probe_timeout_s: float = 10.0
    http: HttpOptions = field(default_factory=HttpOptions)


def make(kind: str, url: str, options: AdapterOptions | None = None) -> Adapter:
    """The adapter of a known kind. Raises ValueError for an unknown kind or an unusable URL."""
    options = options or AdapterOptions()
    if kind not in KINDS:
        raise ValueError(f"backend kind {kind!r} is not one of {', '.join(KINDS)}")
    upstream = HttpUpstream(url, options.http)
    if kind in _SCHEDULE_BY_PRIORITY:
        return _SCHEDULE_BY_PRIORITY[kind](
            upstream,
            api_key=options.api_key,
            priority=options.priority,
            probe_timeout_s=options.probe_timeout_s,
        )
    if kind == "tgi":
        return TgiAdapter(upstream, api_key=options.api_key, probe_timeout_s=options.probe_timeout_s)
    return OpenAIAdapter(
        upstream,
        api_key=options.api_key,
        adds_usage=options.adds_usage,
        probe_timeout_s=options.probe_timeout_s,
    )


async def detect(url: str, options: AdapterOptions | None = None) -> Adapter:
    """The adapter for whatever answers at `url`: vLLM (or what emulates it), SGLang, TGI, else plain OpenAI.

    It is vLLM or SGLang when its model list says so, or when its metrics carry their names; TGI when /info says
    so. Raises UpstreamError when nothing answers, ValueError for an unusable URL.
    """
    options = options or AdapterOptions()
    upstream = HttpUpstream(url, options.http)
    try:
        kind = await _kind_of(upstream, options)
    finally:
        await upstream.close()
    return make(kind, url, options)


async def _kind_of(upstream: HttpUpstream, options: AdapterOptions) -> str:
    api_key, timeout_s = options.api_key, options.probe_timeout_s
    answer = await ask(upstream, "GET", "/v1/models", api_key=api_key, timeout_s=timeout_s)
    if answer.status == 200:
        owners = ModelList.read(answer.body, emulated=False).owners
        for owner, kind in _BY_OWNER.items():
            if owner in owners:
                return kind
    metrics = await _try_get(upstream, "/metrics", options)
    for kind, prefix in _BY_METRICS.items():
        if metrics.status == 200 and prefix in b"\n" + metrics.body:
            return kind
    info = await _try_get(upstream, "/info", options)
    return "tgi" if info.status == 200 and is_tgi(info.json_object()) else "openai"


async def _try_get(upstream: HttpUpstream, path: str, options: AdapterOptions) -> Answer:
    """A route that is silent or missing says nothing of the server."""
    try:
        return await ask(upstream, "GET", path, api_key=options.api_key, timeout_s=options.probe_timeout_s)
    except UpstreamError:
        return NO_ANSWER
