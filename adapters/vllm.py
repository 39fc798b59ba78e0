"""Stock vLLM over HTTP, and the emulated engine, which looks the same and says that it emulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import orjson

from adapters.ahead import longest_of, prefix_body, prompt_question
from adapters.contract import (
    Capabilities,
    EngineLoad,
    OutgoingRequest,
    PromptIds,
    Support,
    Unsupported,
    Upstream,
    UpstreamCall,
    UpstreamError,
)
from adapters.control import EngineControl
from adapters.errors import message_of
from adapters.exchange import ANSWER_LIMIT_BYTES
from adapters.exposition import Sample, Scanner, mean, total
from adapters.monitored import MonitoredAdapter, positive_int, tokenize_question
from adapters.promises import with_promise
from tiergate_engine.control import EngineState, Orders, StepFacts

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USED = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")
_CACHE_CONFIG = "vllm:cache_config_info"
_SPECULATION = "vllm:spec_decode_num_drafts_total"
_LOAD = Scanner((_RUNNING, _WAITING, *_KV_USED, *_PREEMPTIONS))
_STATIC = Scanner((_RUNNING, _CACHE_CONFIG, _SPECULATION))

_SAID = {"True": Support.YES, "False": Support.NO}  # a Python value as a label

_PRIORITY_HEADER = "x-vllm-priority"
_LAST = 2**63 - 1  # vLLM keeps priorities in 64 bits
_GENERATIONS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
# Guarded by --api-key, so first; the other one exists in development mode and with --tokens-only.
_ABORT_PATHS = ("/inference/v1/abort_requests", "/abort_requests")
# What decides how many tokens a chat prompt has, and is known to /tokenize.
_CHAT_TOKENIZE_FIELDS = (
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)


class VllmAdapter(MonitoredAdapter):
    """One vLLM server.

    Priority is sent as a header, so a request's body stays as it came. Whether the engine *schedules* by it
    cannot be seen from outside: vLLM 0.32 takes a priority under any policy and ignores it under `fcfs`. So it is
    YES only when the configuration or development mode's /server_info says so, NO when the engine refuses a
    one-token request that has one (older versions), else UNKNOWN, and then it is sent: it does no harm.
    """

    family = "vLLM"

    def __init__(
        self,
        upstream: Upstream,
        *,
        api_key: str | None = None,
        priority: Support = Support.UNKNOWN,
        probe_timeout_s: float = 10.0,
    ) -> None:
        """`priority`: what is known from configuration; other than UNKNOWN, nothing is probed for it."""
        super().__init__(upstream, api_key=api_key, probe_timeout_s=probe_timeout_s)
        self._configured_priority = priority
        self._sends_priority = priority is Support.YES
        self._abort_path: str | None = None
        self._tokenize = Support.UNKNOWN
        self._control = EngineControl(self._ask)

    async def probe(self) -> Capabilities:
        """Ask for models, version, metrics and routes; costs at most one generated token.

        Raises UpstreamError when the server does not answer, or wants another API key.
        """
        models = await self._ask_models()
        samples = await self._try_samples(_STATIC)
        scheduler = await self._scheduler_config()
        cache = _cache_of(samples)
        self._tokenize = await self._has_post_route("/tokenize")
        self._abort_path = None
        for path in _ABORT_PATHS:
            if await self._aborts_at(path):
                self._abort_path = path
                break
        priority = await self._probe_priority(models.names, scheduler)
        plugin = await self._find_plugin()
        drivable = Support.YES if self._control.drivable else Support.NO
        speculates = any(sample.name == _SPECULATION for sample in samples)
        interval = positive_int(scheduler.get("stream_interval")) or 1
        return Capabilities(
            engine="vllm",
            version=await self._version(),
            emulated=models.emulated,
            models=models.names,
            max_model_tokens=models.max_model_tokens,
            kv_tokens=cache.kv_tokens,
            block_tokens=cache.block_tokens,
            max_running_seqs=plugin.max_running_seqs if plugin else positive_int(scheduler.get("max_num_seqs")),
            max_batched_tokens=(
                plugin.max_batched_tokens if plugin else positive_int(scheduler.get("max_num_batched_tokens"))
            ),
            priority=priority,
            tokenize=self._tokenize,
            abort_by_id=Support.NO if self._abort_path is None else Support.YES,
            continuous_usage=Support.YES,
            chunk_budget=drivable,
            running_cap=drivable,
            driven=drivable,
            load=Support.YES if any(sample.name == _RUNNING for sample in samples) else Support.NO,
            tokens_per_event=None if speculates or interval > 1 else 1,
            prefix_caching=cache.prefixes,
            engines=cache.engines,
        )

    async def read_load(self) -> EngineLoad:
        """From /metrics, summed over data-parallel engines. Raises UpstreamError."""
        samples = await self._samples(_LOAD)
        return EngineLoad(
            running=total(samples, _RUNNING),
            waiting=total(samples, _WAITING),
            kv_used_fraction=mean(samples, *_KV_USED),
            preemptions=total(samples, *_PREEMPTIONS),
        )

    async def read_server_load(self) -> int | None:
        """Requests the API server itself counts (/load); None unless it was started to track them.

        A server that does not track them answers 0 always, so only a positive number says something.
        """
        answer = await self._ask("GET", "/load")
        return positive_int(answer.json_object().get("server_load")) if answer.status == 200 else None

    def prepare(self, request: OutgoingRequest) -> UpstreamCall:
        """As OpenAI, and the deadline of the first token as the priority, in a header (a client's own one is
        dropped); the least urgent without one.

        An engine with Tiergate's plug-in gets the promise in the body, among `vllm_xargs`; what a client says
        there in the plug-in's words is dropped.
        """
        call = super().prepare(request)
        headers = {name: value for name, value in call.headers.items() if name.lower() != _PRIORITY_HEADER}
        if self._sends_priority:
            # without one a request counts as 0, which is before every deadline
            priority = _LAST if request.due_ms is None else min(request.due_ms, _LAST)
            headers[_PRIORITY_HEADER] = str(priority)
        body = call.body
        if self._control.drivable and call.path in _GENERATIONS:
            body = with_promise(body, request.promise)
        return UpstreamCall(call.method, call.path, headers, body, call.timeout_s)

    async def set_chunk_budget(self, tokens: int | None) -> None:
        """Most prompt tokens a step may carry from now on, on top of its decodes. Raises Unsupported."""
        await self.give_orders(replace(self._control.orders, chunk_tokens=tokens))

    async def set_running_cap(self, sequences: int | None) -> None:
        """Most sequences that may run from now on; more that run already end as they are. Raises Unsupported."""
        await self.give_orders(replace(self._control.orders, running_cap=sequences))

    async def give_orders(self, orders: Orders) -> EngineState:
        """What the plug-in does from the next step on. Raises Unsupported without it, or UpstreamError."""
        return await self._control.give(orders)

    async def read_state(self) -> EngineState:
        """What the plug-in says of the engine. Raises Unsupported without it, or UpstreamError."""
        return await self._control.state()

    async def read_steps(self, since: int) -> StepFacts:
        """The engine's steps from number `since` on. Raises Unsupported without the plug-in, or UpstreamError."""
        return await self._control.steps(since)

    async def abort(self, request_id: str) -> None:
        """Abort what was sent under `request_id`. Raises Unsupported, or UpstreamError.

        The engine knows a completion as ``cmpl-<id>-<index of the prompt>`` and a chat as ``chatcmpl-<id>``; it
        passes over names it does not know, so the first prompt's and the chat's are both given. The list is
        never empty: an empty one aborts everything.
        """
        if self._abort_path is None:
            raise Unsupported(
                "abort by id: the server has no abort route (development mode or --enable-scale-out)"
            )
        body = orjson.dumps({"request_ids": [f"cmpl-{request_id}-0", f"chatcmpl-{request_id}"]})
        answer = await self._ask("POST", self._abort_path, body)
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)

    async def count_tokens(self, body: Mapping[str, object]) -> int:
        """Prompt tokens by /tokenize; a prompt of token ids is counted here.

        Raises Unsupported for a list of several texts, for too deep nesting, or a server without the route;
        UpstreamError when the engine refuses the prompt.
        """
        question = tokenize_question(body, _CHAT_TOKENIZE_FIELDS)
        if isinstance(question, int):
            return question
        answer = await self._ask_tokenizer("/tokenize", question, self._tokenize)
        count = answer.json_object().get("count")
        if not isinstance(count, int):
            raise Unsupported("count tokens: /tokenize answered without a count")
        return count

    async def prompt_ids(self, path: str, body: bytes) -> PromptIds:
        """By /tokenize; token ids are taken as they are (`adapters.contract.ComputesAhead`)."""
        question, keyed = prompt_question(path, body, _CHAT_TOKENIZE_FIELDS)
        if isinstance(question, tuple):
            return PromptIds(question, keyed)
        answer = (await self._ask_tokenizer("/tokenize", question, self._tokenize)).json_object()
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise Unsupported("compute ahead: /tokenize answered without token ids")
        if len(ids) >= longest_of(answer):
            raise Unsupported("compute ahead: the prompt is longer than the model takes")
        return PromptIds(tuple(ids), keyed)

    async def compute_ahead(self, prompt: PromptIds, tokens: int, like: OutgoingRequest) -> None:
        """As a completion of one token, under an id made of the request's (`adapters.contract.ComputesAhead`)."""
        name = f"{like.request_id}-ahead-{tokens}"
        sent = replace(
            like,
            path="/v1/completions",
            body=prefix_body(prompt, tokens),
            request_id=name,
            streamed=False,
            want_usage=False,
            promise=None,
        )
        response = await self._upstream.open(self.prepare(sent))
        try:
            answer = await response.read_all(ANSWER_LIMIT_BYTES)
        except BaseException:
            response.abort()
            raise
        response.release()
        if response.status != 200:
            raise self.response_failure(response.status, answer)

    async def _find_plugin(self) -> EngineState | None:
        try:
            return await self._control.find()
        except UpstreamError:
            return None

    async def _version(self) -> str | None:
        answer = await self._try_get("/version")
        version = answer.json_object().get("version") if answer.status == 200 else None
        return version if isinstance(version, str) else None

    async def _scheduler_config(self) -> Mapping[str, object]:
        """Development mode's word on the scheduler; empty without it."""
        answer = await self._try_get("/server_info?config_format=json")
        config = answer.json_object().get("vllm_config") if answer.status == 200 else None
        scheduler = config.get("scheduler_config") if isinstance(config, dict) else None
        return scheduler if isinstance(scheduler, dict) else {}

    async def _aborts_at(self, path: str) -> bool:
        """Whether an abort route works. vLLM has one that is there and refuses everything, so it is tried out."""
        nobody = orjson.dumps({"request_ids": ["tiergate-probe"]})
        try:
            return (await self._ask("POST", path, nobody)).status == 200
        except UpstreamError:
            return False

    async def _probe_priority(self, models: tuple[str, ...], scheduler: Mapping[str, object]) -> Support:
        if self._configured_priority is not Support.UNKNOWN:
            return self._configured_priority
        policy = scheduler.get("policy")
        if isinstance(policy, str):
            self._sends_priority = policy == "priority"
            return Support.YES if self._sends_priority else Support.NO
        if not models:
            return Support.UNKNOWN
        body = {"model": models[0], "prompt": "a", "max_tokens": 1, "priority": 1}
        try:
            answer = await self._ask("POST", "/v1/completions", orjson.dumps(body))
        except UpstreamError:
            return Support.UNKNOWN
        self._sends_priority = answer.status == 200
        refused = answer.status == 400 and "priority" in (message_of(answer.body) or "").lower()
        return Support.NO if refused else Support.UNKNOWN


@dataclass(frozen=True, slots=True)
class _Cache:
    """What /metrics tells of the KV cache."""

    block_tokens: int | None = None
    kv_tokens: int | None = None
    prefixes: Support = Support.UNKNOWN
    engines: int | None = None


def _cache_of(samples: tuple[Sample, ...]) -> _Cache:
    """Each engine has a line of its own, which carries the number of blocks of all of them."""
    lines = [sample.labels for sample in samples if sample.name == _CACHE_CONFIG]
    if not lines:
        return _Cache()
    block_tokens = positive_int(lines[0].get("block_size"))
    blocks = positive_int(lines[0].get("num_gpu_blocks"))
    prefixes = _SAID.get(lines[0].get("enable_prefix_caching", ""), Support.UNKNOWN)
    return _Cache(block_tokens, block_tokens * blocks if block_tokens and blocks else None, prefixes, len(lines))
