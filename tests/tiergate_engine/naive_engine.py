"""vLLM's scheduler written down plainly, sequence by sequence: what the engine model is checked against."""

from __future__ import annotations

from dataclasses import dataclass

from tiergate_engine.model import EngineConfig, SequenceSpec
from tiergate_engine.step import Step


@dataclass(eq=False)
class NaiveSequence:
    spec: SequenceSpec
    arrival: int
    kv: int = 0
    generated: int = 0
    granted: int = 0
    decoding: bool = False

    @property
    def todo(self) -> int:
        return self.spec.prompt_tokens + self.generated - self.kv

    def blocks(self, block: int) -> int:
        return -(-(self.kv + self.granted) // block)


class NaiveEngine:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.budget = config.max_batched_tokens
        self.running: list[NaiveSequence] = []
        self.waiting: list[NaiveSequence] = []
        self.arrivals = 0
        self.preemptions = 0

    @property
    def free(self) -> int:
        block = self.config.block_tokens
        return self.config.kv_tokens // block - sum(sequence.blocks(block) for sequence in self.running)

    def key(self, sequence: NaiveSequence) -> tuple[int, int]:
        return (sequence.spec.priority if self.config.priority_scheduling else 0), sequence.arrival

    def submit(self, spec: SequenceSpec) -> None:
        self.arrivals += 1
        self.waiting.append(NaiveSequence(spec, self.arrivals))

    def abort(self, sequence_id: str) -> None:
        self.running = [s for s in self.running if s.spec.sequence_id != sequence_id]
        self.waiting = [s for s in self.waiting if s.spec.sequence_id != sequence_id]

    def plan(self) -> Step:
        block = self.config.block_tokens
        budget = self.budget
        preempted = False
        for sequence in list(self.running):
            tokens = min(sequence.todo, budget)
            if sequence not in self.running or not tokens:
                continue
            sequence.granted = tokens
            while self.free < 0:
                preempted = True
                self.preemptions += 1
                by_priority = self.config.priority_scheduling
                victim = max(self.running, key=self.key) if by_priority else self.running[-1]
                self.running.remove(victim)
                if victim is not sequence:
                    budget += victim.granted
                victim.kv = victim.granted = 0
                victim.decoding = False
                self.waiting.append(victim)
                if victim is sequence:
                    break
            budget -= sequence.granted
        self.waiting.sort(key=self.key)
        while self.waiting and not preempted and budget and len(self.running) < self.config.max_running_seqs:
            head = self.waiting[0]
            tokens = min(head.todo, budget)
            if -(-(head.todo if self.config.whole_prompt else tokens) // block) > self.free:
                break
            self.waiting.pop(0)
            self.running.append(head)
            head.granted = tokens
            budget -= tokens
        step = Step()
        for sequence in self.running:
            if sequence.granted:
                kv = sequence.kv
                step += Step.decode(1, kv + 1) if sequence.decoding else Step.chunk(sequence.granted, kv)
        return step

    def finish(self) -> list[tuple[str, int, bool]]:
        out = []
        for sequence in list(self.running):
            if not sequence.granted:
                continue
            sequence.kv += sequence.granted
            sequence.granted = 0
            if not sequence.todo:
                sequence.generated += 1
                sequence.decoding = True
                finished = sequence.generated == sequence.spec.output_tokens
                out.append((sequence.spec.sequence_id, sequence.generated - 1, finished))
                if finished:
                    self.running.remove(sequence)
        return out
