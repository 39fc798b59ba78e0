"""What planning a step costs inside vLLM: `python -m tests.tiergate_engine.vllm.cost` in the engine's environment.

Counted is the plug-in's own CPU time, plan and facts, with caches as vLLM's code leaves them; beside it stands
what vLLM's own `schedule` of those steps takes. No model runs (`made_up`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.tiergate_engine.vllm.made_up import STEP_TIME, Engine, Size
from tiergate_engine.control import Mode, Orders, Promise
from tiergate_engine.drive import Rules

STEPS = 400
STEP_S = 5e-3


def loaded(decodes: int, prompts: bool) -> Engine:
    """A driven engine with that many streams of several paces, and maybe long prompts that do not end."""
    engine = Engine(asynchronous=True, size=Size(seqs=512, tokens=2048, blocks=200_000))
    engine.scheduler.tiergate.order(Orders(Mode.DRIVEN, STEP_TIME, Rules()), engine.clock.now_s)
    for number in range(decodes):
        engine.add(f"d{number}", 10, 4000, Promise(1.0, 0.02 + 0.001 * (number % 5)))
    for _ in range(10):
        engine.step()
    if prompts:
        for number in range(STEPS // 2):
            engine.add(f"p{number}", 8000, 4, Promise(1000.0 + number, 0.05))
    return engine


def timed(owner: Any, name: str, took: list[float]) -> None:
    """Note the CPU time of each call of a method."""
    own: Callable[..., object] = getattr(owner, name)

    def call(*args: Any) -> object:
        from_s = time.thread_time()
        answer = own(*args)
        took.append(time.thread_time() - from_s)
        return answer

    setattr(owner, name, call)


def microseconds(engine: Engine) -> tuple[float, float]:
    """Medians of the plug-in's time and of a whole `schedule`, the plug-in's in it."""
    plans: list[float] = []
    facts: list[float] = []
    whole: list[float] = []
    timed(engine.scheduler, "_begin", plans)
    timed(engine.scheduler, "_note_scheduled", facts)
    timed(engine.scheduler, "schedule", whole)
    for _ in range(STEPS):
        engine.step()
    ours = [plan + fact for plan, fact in zip(plans, facts, strict=True)]
    return statistics.median(ours) * 1e6, statistics.median(whole) * 1e6


def main() -> None:
    """Print a line for each number of streams."""
    for prompts in (False, True):
        for decodes in (16, 64, 128, 256):
            ours_us, whole_us = microseconds(loaded(decodes, prompts))
            load = f"{decodes} decodes{' and a queue of long prompts' if prompts else ''}"
            print(
                f"{load}: {ours_us:.0f} us, {ours_us * 1e-6 / STEP_S:.1%} of a step of 5 ms; "
                f"vLLM's own part {whole_us - ours_us:.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
