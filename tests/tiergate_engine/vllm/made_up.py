"""vLLM's own schedulers without a model: every scheduled sequence gets a made-up token, on a made-up clock.

Runs in the engine's environment. The steps are filled, and their outputs taken in, by vLLM's code in the order in
which its engine core does it; the asynchronous scheduler fills a step while another one runs. **No model and no
GPU runs here**, so it says nothing about what a GPU's model runner makes of such steps.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tiergate_engine import vllm as plugin
from tiergate_engine.control import Promise
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime
from tiergate_engine.vllm import calls, scheduler

MODEL = Path(__file__).resolve().parents[3] / ".engine" / "model"
STEP_TIME = RooflineStepTime(c0_s=0.005, per_token_s=20e-6, per_seq_s=50e-6, per_kv_s=2e-8)
"""A step of 10 decodes takes 5.7 ms, one of 500 prompt tokens 15 ms."""
BLOCK_TOKENS = 16


@dataclass
class Clock:
    """Stands in for the `time` module in the driven scheduler."""

    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s + 5e8

    def thread_time(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Size:
    """An engine's limits."""

    seqs: int = 16
    tokens: int = 512
    blocks: int = 2000


@dataclass
class Said:
    """What the plug-in logged."""

    lines: list[str] = field(default_factory=list)


class _Listener(logging.Handler):
    def __init__(self, said: Said) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.lines.append(record.getMessage())


def settings(asynchronous: bool, size: Size) -> dict[str, Any]:
    """What vLLM's engine core gives to a scheduler's class."""
    model = ModelConfig(model=str(MODEL), dtype="float32")
    limits = SchedulerConfig(
        max_num_seqs=size.seqs,
        max_num_batched_tokens=size.tokens,
        max_model_len=8192,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=False)
    config = VllmConfig(model_config=model, scheduler_config=limits, cache_config=cache)
    limits.async_scheduling = asynchronous  # the CPU platform turns it off; no platform runs here
    cache.num_gpu_blocks = size.blocks
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return {
        "vllm_config": config,
        "kv_cache_config": KVCacheConfig(
            num_blocks=size.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        "structured_output_manager": StructuredOutputManager(config),
        "block_size": BLOCK_TOKENS,
        "hash_block_size": BLOCK_TOKENS,
        "include_finished_set": False,
        "log_stats": False,
    }


class Engine:
    """One scheduler and what came out of it. `steps` are the tokens by request of each step, as filled."""

    def __init__(self, *, asynchronous: bool, driven: bool = True, size: Size | None = None) -> None:
        self.asynchronous = asynchronous
        self.clock = Clock()
        self.said = Said()
        for module in (scheduler, calls):
            mock.patch.object(module, "time", self.clock).start()
        logger = logging.getLogger("vllm.tiergate")
        logger.handlers = [_Listener(self.said)]
        logger.propagate = False
        given = settings(asynchronous, size or Size())
        own = AsyncScheduler if asynchronous else Scheduler
        self.scheduler: Any = plugin.Scheduler(**given) if driven else own(**given)
        self.steps: list[dict[str, int]] = []
        self.tokens_s: dict[str, list[float]] = {}
        self.finished: list[str] = []
        self._flying: deque[tuple[Any, set[str], float]] = deque()
        self._free_s = self.clock.now_s

    def add(self, name: str, prompt: int, output: int, promise: Promise | None = None, age_s: float = 0.0) -> None:
        """A request comes to the server, `age_s` before it comes to the engine."""
        xargs = None if promise is None else dict(promise.to_xargs())
        params = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=xargs)
        params.update_from_generation_config({}, 1)
        came_s = self.clock.time() - age_s
        self.scheduler.add_request(Request(name, [7] * prompt, params, None, arrival_time=came_s))
        self.tokens_s[name] = []

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """One turn of the engine core's loop; whether there is more to do."""
        depth = 2 if self.asynchronous else 1
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            held = dict(output.num_scheduled_tokens)
            seconds = STEP_TIME.seconds(self._content(held)) if held else 0.0
            self._free_s = max(self._free_s, self.clock.now_s) + seconds
            self.steps.append(held)
            partial = {name for name in held if self.scheduler.requests[name].is_prefill_chunk}
            self._flying.append((output, partial, self._free_s))
            if len(self._flying) < depth and held:
                return True
        if self._flying:
            self._take_in(*self._flying.popleft())
        return bool(self._flying) or bool(self.scheduler.has_requests())

    def run(self, most_steps: int = 3000) -> None:
        """Until nothing is left to do."""
        for _ in range(most_steps):
            if not self.step():
                return
        raise AssertionError(f"not done after {most_steps} steps: {self.scheduler.get_request_counts()}")

    def _take_in(self, output: Any, partial: set[str], ends_s: float) -> None:
        names = list(output.num_scheduled_tokens)
        self.clock.now_s = max(self.clock.now_s, ends_s)
        made = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if name in partial else [9] for name in names],
        )
        outputs = self.scheduler.update_from_output(output, made)
        for told in outputs.values():
            for one in told.outputs:
                self.tokens_s[one.request_id] += [self.clock.now_s] * len(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.append(one.request_id)

    def _content(self, held: dict[str, int]) -> Step:
        total = Step()
        for name, tokens in held.items():
            computed = self.scheduler.requests[name].num_computed_tokens
            before = computed - tokens
            decodes = before >= self.scheduler.requests[name].num_prompt_tokens and tokens == 1
            total += Step.decode(1, computed) if decodes else Step.chunk(tokens, before)
        return total
