"""What filling a step costs: `python -m bench.fill_cost`.

The sequences are those an engine's scheduler would hold: N running ones, of which one is an unfinished prompt and
the others decode, and N/4 prompts in the queue. Timed together are the sum over the decodes, the making of the
prefill values, and `fill`: in stock order, by deadline, and by deadline with a time budget. For comparison: a step
of the whole engine model with N decodes, telling milestones only, and telling every token. The best round counts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from profiles.catalogue import load
from tiergate_engine.fill import Order, Prefill, StepLimits, fill
from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import Step, StepTime

RUNNING = (16, 64, 256)
TITLES = ("running", "queued", "stock", "deadline", "and time", "model", "all out")
ROUNDS = 7


@dataclass(slots=True)
class Held:
    """A sequence as an engine's scheduler holds it."""

    prompt_tokens: int
    computed_tokens: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Scene:
    decodes: list[Held]
    prompts: list[Held]  # the first one runs already


def scene(running: int, seed: int = 1) -> Scene:
    chance = random.Random(seed)

    def held(computed: int) -> Held:
        prompt = chance.randint(200, 4000)
        return Held(prompt, prompt + 100 if computed else 0, chance.uniform(0.05, 5.0))

    decodes = [held(1) for _ in range(running - 1)]
    return Scene(decodes, [held(0) for _ in range(1 + running // 4)])


def fill_once(what: Scene, limits: StepLimits, order: Order, step_time: StepTime | None) -> list[int]:
    decodes = what.decodes
    base = Step.decode(len(decodes), sum([held.computed_tokens for held in decodes]))
    prefills = [
        Prefill(held.prompt_tokens - held.computed_tokens, held.computed_tokens, index == 0, held.deadline_s)
        for index, held in enumerate(what.prompts)
    ]
    return fill(base, prefills, limits, order, step_time)


def best_us(call: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, time.perf_counter() - start)
    return best / times * 1e6


def model_us(running: int, step_time: StepTime, steps: int, every_token: bool) -> float:
    """A step of the engine model in which `running` sequences decode."""
    engine = EngineModel(EngineConfig(kv_tokens=1_000_000, max_model_tokens=100_000), step_time)
    for index in range(running):
        engine.submit(SequenceSpec(str(index), 64, 50_000), 0.0)
    for _ in range(running):
        engine.next_step(0.0)
        engine.finish_step(0.0)
    finish = engine.finish_step if every_token else engine.finish_step_milestones

    def one_step() -> None:
        engine.next_step(0.0)
        finish(0.0)

    return best_us(one_step, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds a step to fill it.")
    parser.add_argument("--profile", default="h200-llama-3.1-8b-fp8")
    parser.add_argument("--times", type=int, default=1000)
    args = parser.parse_args()
    step_time = load(args.profile).step_time
    print(f"microseconds a step, profile {args.profile}, best of {ROUNDS} rounds of {args.times}")
    print("".join(f"{title:>10}" for title in TITLES))
    for running in RUNNING:
        what = scene(running)
        stock = StepLimits(tokens=2048, new_seqs=16, free_blocks=20_000)
        # A budget that leaves room for a chunk of some hundred tokens beside the decodes.
        base_s = step_time.decode_seconds(running, 2000 * running)
        timed = StepLimits(tokens=2048, new_seqs=16, free_blocks=20_000, within_s=base_s + 0.015)

        def cost(limits: StepLimits, order: Order, clock: StepTime | None, at: Scene = what) -> float:
            return best_us(lambda: fill_once(at, limits, order, clock), args.times)

        print(
            f"{running:>10}{running // 4:>10}"
            f"{cost(stock, Order.GIVEN, None):>10.1f}"
            f"{cost(stock, Order.DEADLINE, None):>10.1f}"
            f"{cost(timed, Order.DEADLINE, step_time):>10.1f}"
            f"{model_us(running, step_time, args.times, every_token=False):>10.1f}"
            f"{model_us(running, step_time, args.times, every_token=True):>10.1f}"
        )


if __name__ == "__main__":
    main()
