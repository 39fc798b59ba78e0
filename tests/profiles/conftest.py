"""An engine in virtual time: real steps of the engine model, no waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from profiles.measure import Completion, MeasureError
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import StepTime


class VirtualEngine:
    """A `profiles.measure.Connection` to the engine model; answers take `overhead_s` besides their steps."""

    def __init__(self, step_time: StepTime, config: EngineConfig, overhead_s: float = 0.0) -> None:
        self._model = EngineModel(config, step_time)
        self._overhead_s = overhead_s
        self._now_s = 100.0
        self._work = asyncio.Event()
        self._count = 0
        self._open: dict[str, tuple[list[float], asyncio.Event]] = {}
        self.refuse_beyond: int | None = None

    def now_s(self) -> float:
        return self._now_s

    async def complete(self, prompt_tokens: int, output_tokens: int) -> Completion:
        if self.refuse_beyond is not None and prompt_tokens > self.refuse_beyond:
            raise MeasureError(f"the engine refused a prompt of {prompt_tokens} tokens")
        self._count += 1
        key, sent_s = str(self._count), self._now_s
        tokens: list[float] = []
        done = asyncio.Event()
        self._open[key] = tokens, done
        self._model.submit(SequenceSpec(key, prompt_tokens, output_tokens), self._now_s)
        self._work.set()
        await done.wait()
        return Completion(sent_s, tuple(at_s + self._overhead_s for at_s in tokens), prompt_tokens)

    async def _run(self) -> None:
        while True:
            # Everybody who can act at this instant acts before time goes on.
            for _ in range(20):
                await asyncio.sleep(0)
            step = self._model.next_step(self._now_s)
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            self._now_s = step.ends_s
            for emitted in self._model.finish_step(self._now_s):
                tokens, done = self._open[emitted.sequence_id]
                tokens.append(self._now_s)
                if emitted.finished:
                    done.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[VirtualEngine]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run())
            yield self
            task.cancel()
