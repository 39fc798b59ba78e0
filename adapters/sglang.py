"""SGLang over HTTP: live load without a scrape, a running cap that can be set, and priorities from a small set.

What is told here of SGLang was read in the source of versions 0.5.12 to 0.5.23, not tried on a live server.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace

import orjson

from adapters.body import with_members
from adapters.contract import (
    Capabilities,
    DecodePace,
    EngineLoad,
    Failure,
    OutgoingRequest,
    Support,
    Unsupported,
    Upstream,
    UpstreamCall,
    UpstreamError,
)
from adapters.exchange import NO_ANSWER, Answer
from adapters.exposition import Sample, Scanner, mean, total
from adapters.monitored import MonitoredAdapter, tokenize_question
from adapters.openai import OpenAIAdapter
from adapters.sglang_state import Loads, Pace, ServerInfo

_RUNNING = "sglang:num_running_reqs"
_WAITING = "sglang:num_queue_reqs"
_KV_USED = "sglang:token_usage"
_METRICS = Scanner((_RUNNING, _WAITING, _KV_USED))
_LOADS_PATH = "/v1/loads?include=core"
# The newer name first; the older one is still there but is said to go.
_INFO_PATHS = ("/server_info", "/get_server_info")

_CHAT = "/v1/chat/completions"
_BY_BODY = frozenset({_CHAT, "/v1/completions"})  # whose bodies take `rid` and `priority`
_BY_HEADER = frozenset({_CHAT, "/v1/messages"})  # which take headers for them, where the server is told to
_PRIORITY_HEADER, _ID_HEADER = "x-override-priority", "x-override-rid"
# A request of several sequences gives each an id of its own. A quote in a JSON text is escaped, so this finds
# members only.
_SEVERAL = re.compile(rb'"prompt"\s*:\s*\[|"n"\s*:\s*(?!1\s*[,}]|null)')

MOST_URGENT = 10
"""Priorities go from 0 to this. With SGLang's own threshold no two of them are far enough apart to preempt."""
_SLOWEST_LEVEL_MS = 64_000  # what has this long or longer gets priority 1; each halving of it is one more

_CHAT_TOKENIZE_FIELDS = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "continue_final_message",
    "chat_template_kwargs",
)
_PROBE_ID = "tiergate-probe"
_IDS_KEPT = 8_192  # of the requests that were sent last, so that they can be aborted
_PRIORITY_REFUSED = "Using priority is disabled"


class SglangAdapter(MonitoredAdapter):
    """One SGLang server.

    * An id is matched by its beginning when a request is aborted, so ours are all of one length. One that is in
      flight already is refused, so each sending has its own, whatever id its client gave.
    * A stream whose client left goes on for two seconds, unless it is aborted by its id.
    * Priorities come from eleven values. SGLang keeps a gauge for every value it ever saw, so deadlines themselves
      would grow its metrics for ever; and it preempts running sequences by large differences.
    * Its running cap is set for each micro-batch of each data-parallel rank. Lowering it ends nothing; raising it
      may show only when a sequence ends.
    * Its chunk size is set at launch. With Tiergate's plug-in in the server (`tiergate_engine.sglang`) it can be
      lowered while it runs. Where chunks have steps of their own, one follows the other and decodes wait for all
      of them; so a step of decodes is asked for between them, without which no size would protect anybody.
    * /health generates a token and takes a second by default, so it is not asked.
    * An event may carry several tokens: the server merges what waits to be written.
    """

    family = "SGLang"

    def __init__(
        self,
        upstream: Upstream,
        *,
        api_key: str | None = None,
        priority: Support = Support.UNKNOWN,
        probe_timeout_s: float = 10.0,
    ) -> None:
        """`priority`: what is known from configuration; UNKNOWN asks the server."""
        super().__init__(upstream, api_key=api_key, probe_timeout_s=probe_timeout_s)
        self._configured_priority = priority
        self._levels = MOST_URGENT if priority is Support.YES else 0
        self._low_first = False
        self._info = ServerInfo.read({})
        self._tokenize = Support.UNKNOWN
        self._aborts = self._caps = self._chunks = False
        self._has_loads = True
        self._earlier: Loads | None = None
        # Other gateways send to the server as well.
        self._nonce = secrets.token_bytes(8)
        self._sent = 0
        self._ids: dict[str, str] = {}  # by the request's own

    async def probe(self) -> Capabilities:
        """Ask for models, settings, loads and routes; nothing is generated.

        A running cap or chunk size that is in force is written back as it is, which shows whether it can be set.
        Raises UpstreamError when the server does not answer, or wants another API key.
        """
        models = await self._ask_models()
        info = self._info = ServerInfo.read((await self._ask_info()).json_object())
        self._tokenize = await self._has_post_route("/tokenize")
        self._aborts = (await self._try_post("/abort_request", {"rid": _PROBE_ID})).status == 200
        self._caps = await self._takes(info.cap_name, info.cap)
        self._chunks = (
            info.chunk is not None
            and (info.mixed or info.interval is not None)
            and await self._takes("chunked_prefill_size", info.chunk.now)
        )
        loads = await self._read_loads()
        self._has_loads = loads is not None
        per_rank = info.running_per_rank
        return Capabilities(
            engine="sglang",
            version=info.version,
            emulated=models.emulated,
            models=models.names,
            max_model_tokens=models.max_model_tokens,
            kv_tokens=info.kv_tokens,
            block_tokens=info.page_tokens,
            max_running_seqs=None if per_rank is None else per_rank * info.ranks,
            max_batched_tokens=info.prefill_tokens if info.chunk is None else info.chunk.most,
            priority=self._learn_priority(info),
            tokenize=self._tokenize,
            abort_by_id=_support(self._aborts),
            continuous_usage=Support.YES,
            chunk_budget=_support(self._chunks),
            running_cap=_support(self._caps),
            load=_support(loads is not None or bool(await self._try_samples(_METRICS))),
            tokens_per_event=None,
            lingers=True,
            prefill_interval=None if info.mixed else info.launched_interval,
        )

    async def healthy(self) -> bool:
        """Whether /ready says so; where there is none (before 0.5.20), whether the server answers."""
        try:
            answer = await self._ask("GET", "/ready")
        except UpstreamError:
            return False
        return answer.status == 200 or (answer.status == 404 and await OpenAIAdapter.healthy(self))

    async def read_load(self) -> EngineLoad:
        """From /v1/loads, which is cheap; else from /metrics. Raises UpstreamError."""
        loads = await self._read_loads() if self._has_loads else None
        if loads is not None:
            return EngineLoad(
                running=loads.running,
                waiting=loads.waiting,
                kv_used_fraction=loads.kv_used_fraction,
                waiting_tokens=loads.waiting_tokens,
                age_s=loads.age_s,
            )
        # With priorities, the queue is told once in all (an empty label) and again for every priority.
        samples = tuple(one for one in await self._samples(_METRICS) if not one.labels.get("priority"))
        return EngineLoad(total(samples, _RUNNING), total(samples, _WAITING), _fraction(samples))

    async def read_pace(self) -> Pace | None:
        """How fast the server was since this was last asked; None the first time, and where it tells nothing.

        Raises UpstreamError.
        """
        loads = await self._read_loads()
        earlier, self._earlier = self._earlier, loads
        return None if loads is None or earlier is None else Pace.between(earlier, loads)

    async def read_decode_pace(self) -> DecodePace | None:
        """`read_pace` of steps that held decodes only, with the KV in use at both ends of the time."""
        before = self._earlier
        pace = await self.read_pace()
        decode, after = None if pace is None else pace.decode, self._earlier
        if decode is None or before is None or after is None:
            return None
        if before.used_tokens is None or after.used_tokens is None:
            return None
        kv_tokens = (before.used_tokens + after.used_tokens) / 2
        return DecodePace(decode.steps, decode.mean_seqs, kv_tokens, decode.mean_step_s)

    def prepare(self, request: OutgoingRequest) -> UpstreamCall:
        """As OpenAI, with an id to abort by and a priority; a client's own ones are dropped where we send ours."""
        members: dict[str, object] = {}
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in (_PRIORITY_HEADER, _ID_HEADER)
        }
        if self._aborts and _SEVERAL.search(request.body) is None:
            members["rid"] = self._new_id(request.request_id)
        if self._levels:
            members["priority"] = self._priority(request.left_ms)
        if request.path in _BY_HEADER:
            names = {"rid": _ID_HEADER, "priority": _PRIORITY_HEADER}
            headers |= {names[name]: str(value) for name, value in members.items()}
        body = with_members(request.body, members) if request.path in _BY_BODY else request.body
        return super().prepare(replace(request, headers=headers, body=body))

    def stream_failure(self, first_event: bytes) -> UpstreamError | None:
        """The error that a stream's first event carries: a full queue is told there, behind a status of 200."""
        found = super().stream_failure(first_event)
        return None if found is None else _meant(found)

    def response_failure(self, status: int, body: bytes) -> UpstreamError:
        """What an answer with an error status means."""
        return _meant(super().response_failure(status, body))

    async def abort(self, request_id: str) -> None:
        """Abort what was last sent under `request_id`, in the queue or after the step in flight.

        A request of several sequences is not found by it, and ends when its connection closes. Raises Unsupported,
        or UpstreamError.
        """
        if not self._aborts:
            raise Unsupported("abort by id: the server takes no /abort_request from us")
        engine_id = self._ids.pop(request_id, None)
        if engine_id is None:
            return
        answer = await self._post("/abort_request", {"rid": engine_id})
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)

    async def set_running_cap(self, sequences: int | None) -> None:
        """Most sequences that run from now on, in all ranks together; none of those that run is ended.

        Raises Unsupported, also for fewer than one a rank and stage; UpstreamError.
        """
        info = self._info
        per_rank = info.running_per_rank
        if not self._caps or info.cap_name is None or per_rank is None:
            raise Unsupported("running cap: the server does not let itself be told")
        most = max(per_rank // info.stages, 1)
        cap = most if sequences is None else min(sequences // (info.ranks * info.stages), most)
        if cap < 1:
            raise Unsupported(f"running cap: SGLang cannot run fewer than {info.ranks * info.stages}")
        await self._set({info.cap_name: cap})

    async def set_chunk_budget(self, tokens: int | None) -> None:
        """Most tokens of a step with a chunk from now on, rounded down to what the plug-in takes.

        In mixed steps the decodes count, as elsewhere; chunks with steps of their own get a step of decodes behind
        each. None puts both back as they were launched. Raises Unsupported, UpstreamError.
        """
        info = self._info
        if not self._chunks or info.chunk is None:
            raise Unsupported("chunk budget: the server does not run Tiergate's plug-in, or has no use for it")
        settings = {"chunked_prefill_size": info.chunk.nearest(tokens)}
        if not info.mixed and info.interval is not None:
            settings["prefill_decode_interval"] = info.interval if tokens is None else max(info.interval, 1)
        await self._set(settings)

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

    async def _ask_info(self) -> Answer:
        for path in _INFO_PATHS:
            answer = await self._try_get(path)
            if answer.status == 200:
                return answer
        return NO_ANSWER

    async def _read_loads(self) -> Loads | None:
        answer = await self._try_get(_LOADS_PATH)
        return Loads.read(answer.json_object()) if answer.status == 200 else None

    def _learn_priority(self, info: ServerInfo) -> Support:
        """Priorities are sent only where they decide something and preempt nobody."""
        if self._configured_priority is Support.NO:
            return Support.NO
        self._low_first = info.low_values_first
        apart = MOST_URGENT if info.most_apart is None else min(info.most_apart, MOST_URGENT)
        scheduled = info.schedules_by_priority or self._configured_priority is Support.YES
        self._levels = apart if scheduled else 0
        return _support(self._levels > 0)

    def _priority(self, left_ms: int | None) -> int:
        """A level for the time left to the first token's deadline: 0 without one, more where there is less."""
        level = 0
        if left_ms is not None:
            halvings = math.log2(_SLOWEST_LEVEL_MS / max(left_ms, 1))
            level = 1 + max(0, min(math.floor(halvings), MOST_URGENT - 1))
        level = -(-level * self._levels // MOST_URGENT)
        return -level if self._low_first else level

    def _new_id(self, request_id: str) -> str:
        """An id that no other request has, on this server or any, and of the same length as every other."""
        self._sent += 1
        name = hashlib.blake2b(b"%b %d" % (self._nonce, self._sent), digest_size=16)
        if len(self._ids) >= _IDS_KEPT:
            del self._ids[next(iter(self._ids))]
        self._ids.pop(request_id, None)
        engine_id = self._ids[request_id] = f"tg-{name.hexdigest()}"
        return engine_id

    async def _takes(self, name: str | None, value: int | None) -> bool:
        if name is None or value is None:
            return False
        return _all_updated(await self._try_post("/set_internal_state", {"server_args": {name: value}}))

    async def _set(self, settings: Mapping[str, int]) -> None:
        answer = await self._post("/set_internal_state", {"server_args": settings})
        if answer.status != 200:
            raise self.response_failure(answer.status, answer.body)
        if not _all_updated(answer):
            told = ", ".join(f"{name} of {value}" for name, value in settings.items())
            raise UpstreamError(Failure.REJECTED, f"SGLang did not take a {told}", answer.status)

    async def _post(self, path: str, body: Mapping[str, object]) -> Answer:
        return await self._ask("POST", path, orjson.dumps(body))

    async def _try_post(self, path: str, body: Mapping[str, object]) -> Answer:
        try:
            return await self._post(path, body)
        except UpstreamError:
            return NO_ANSWER


def _meant(found: UpstreamError) -> UpstreamError:
    """A server that refuses priorities says 503 too, but it is the client's own priority that it refuses."""
    if str(found).startswith(_PRIORITY_REFUSED):
        return UpstreamError(Failure.REJECTED, str(found), found.status)
    return found


def _all_updated(answer: Answer) -> bool:
    """Every rank answers for itself, and a refusal comes with status 200 as well."""
    try:
        told = orjson.loads(answer.body) if answer.status == 200 else None
    except orjson.JSONDecodeError:
        return False
    return isinstance(told, list) and bool(told) and all(one is True for one in told)


def _fraction(samples: tuple[Sample, ...]) -> float | None:
    used = mean(samples, _KV_USED)
    return None if used is None else min(used, 1.0)


def _support(has: bool) -> Support:
    return Support.YES if has else Support.NO
