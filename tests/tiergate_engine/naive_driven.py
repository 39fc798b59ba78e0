"""A driven engine written down plainly: every sequence looked at in every step, planned by `plan_step`.

What the engine model is checked against. It has KV for everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiergate_engine.board import Decode
from tiergate_engine.drive import plan_step
from tiergate_engine.fill import Prefill, StepLimits
from tiergate_engine.model import EngineConfig, SequenceSpec
from tiergate_engine.step import Step, StepTime


@dataclass(eq=False)
class NaiveSequence:
    spec: SequenceSpec
    kv: int = 0
    generated: int = 0
    granted: int = 0
    relegated: bool = False

    @property
    def decoding(self) -> bool:
        return self.generated > 0

    @property
    def free(self) -> bool:
        return self.relegated or math.isinf(self.spec.pace_s) or math.isinf(self.spec.first_due_s)

    def slack_s(self, now_s: float) -> float:
        return math.inf if self.free else self.spec.first_due_s + self.generated * self.spec.pace_s - now_s


class NaiveDriven:
    def __init__(self, config: EngineConfig, step_time: StepTime) -> None:
        assert config.drive is not None
        self.config = config
        self.rules = config.drive
        self.step_time = step_time
        self.running: list[NaiveSequence] = []
        self.waiting: list[NaiveSequence] = []
        self.now_s = 0.0

    def submit(self, spec: SequenceSpec) -> None:
        self.waiting.append(NaiveSequence(spec, relegated=spec.relegated))

    def abort(self, sequence_id: str) -> None:
        self.running = [s for s in self.running if s.spec.sequence_id != sequence_id]
        self.waiting = [s for s in self.waiting if s.spec.sequence_id != sequence_id]

    def plan(self) -> tuple[Step, int]:
        """The next step, and how many decodes are left out of it."""
        decodes = [s for s in self.running if s.decoding]
        prompts = [s for s in self.running if not s.decoding] + self.waiting
        asks = [
            Prefill(
                s.spec.prompt_tokens - s.kv,
                s.kv,
                s in self.running,
                s.spec.first_due_s - self.now_s,
                s.relegated,
            )
            for s in prompts
        ]
        config = self.config
        limits = StepLimits(config.max_batched_tokens, config.max_running_seqs - len(self.running))
        plan = plan_step(
            [Decode(s.kv + 1, s.slack_s(self.now_s), math.inf if s.free else s.spec.pace_s) for s in decodes],
            asks,
            limits,
            self.rules,
            self.step_time,
        )
        step = Step()
        for index, sequence in enumerate(decodes):
            sequence.granted = index not in plan.skipped
            if sequence.granted:
                step += Step.decode(1, sequence.kv + 1)
        for index in plan.relegated:
            prompts[index].relegated = True
        for index in plan.order:
            sequence, chunk = prompts[index], plan.chunks[index]
            sequence.granted = chunk
            if chunk:
                step += Step.chunk(chunk, sequence.kv)
                if sequence in self.waiting:
                    self.waiting.remove(sequence)
                    self.running.append(sequence)
        assert plan.tokens == step.tokens
        return step, len(plan.skipped)

    def finish(self) -> list[tuple[str, int, bool]]:
        out = []
        for sequence in list(self.running):
            if not sequence.granted:
                continue
            sequence.kv += sequence.granted
            sequence.granted = 0
            if sequence.kv >= sequence.spec.prompt_tokens:
                sequence.generated += 1
                finished = sequence.generated == sequence.spec.output_tokens
                out.append((sequence.spec.sequence_id, sequence.generated - 1, finished))
                if finished:
                    self.running.remove(sequence)
        return out
