"""Adapters by name, and finding out which one an endpoint wants."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.contract import Adapter, Support, UpstreamError
from adapters.exchange import ask
from adapters.http import HttpOptions, HttpUpstream
from adapters.models import ModelList
from adapters.openai import OpenAIAdapter
from adapters.vllm import VllmAdapter

KINDS = ("vllm", "openai")
_VLLM_OWNERS = frozenset({"vllm", "tiergate-emulated"})


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
    if kind == "vllm":
        return VllmAdapter(
            upstream,
            api_key=options.api_key,
            priority=options.priority,
            probe_timeout_s=options.probe_timeout_s,
        )
    return OpenAIAdapter(
        upstream,
        api_key=options.api_key,
        adds_usage=options.adds_usage,
        probe_timeout_s=options.probe_timeout_s,
    )


async def detect(url: str, options: AdapterOptions | None = None) -> Adapter:
    """The adapter for whatever answers at `url`: vLLM (or an engine that emulates it), else plain OpenAI.

    It is vLLM when its model list says so, or when its metrics carry vLLM's names. Raises UpstreamError when
    nothing answers, ValueError for an unusable URL.
    """
    options = options or AdapterOptions()
    upstream = HttpUpstream(url, options.http)
    try:
        kind = "vllm" if await _looks_like_vllm(upstream, options) else "openai"
    finally:
        await upstream.close()
    return make(kind, url, options)


async def _looks_like_vllm(upstream: HttpUpstream, options: AdapterOptions) -> bool:
    api_key, timeout_s = options.api_key, options.probe_timeout_s
    answer = await ask(upstream, "GET", "/v1/models", api_key=api_key, timeout_s=timeout_s)
    if answer.status == 200 and ModelList.read(answer.body, emulated=False).owners & _VLLM_OWNERS:
        return True
    try:
        answer = await ask(upstream, "GET", "/metrics", api_key=api_key, timeout_s=timeout_s)
    except UpstreamError:
        return False
    return answer.status == 200 and b"\nvllm:" in b"\n" + answer.body
