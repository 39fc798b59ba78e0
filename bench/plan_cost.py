"""What the vLLM plug-in costs a step: `python -m bench.plan_cost`.

Timed is what the plug-in does around vLLM's own `schedule`: the plan, and the note of what the step held and took.
The sequences are stand-ins with the attributes that it reads of vLLM's requests, as many as those have, so that no
vLLM is needed; `python -m tests.tiergate_engine.vllm.cost` does the same inside vLLM's schedulers. A round is many
steps in the process's own CPU time, and the best of many rounds counts, so that other work on the machine weighs
little. A bare loop over a hundred numbers, timed the same way, says how fast the machine was.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from profiles.catalogue import load
from tiergate_engine.control import Mode, Orders
from tiergate_engine.drive import Rules
from tiergate_engine.step import StepTime
from tiergate_engine.vllm.content import step_of
from tiergate_engine.vllm.facts import FactsRing
from tiergate_engine.vllm.pilot import Pilot, Situation
from tiergate_engine.vllm.promises import NO_PROMISE, Due, promise
from tiergate_engine.vllm.waiting import DeadlineQueue

STEP_S = 5e-3
SHARE = 0.02
DECODES = (64, 128, 256)
QUEUES = (0, 8, 64)
PACES_S = (0.02, 0.03, 0.05, 0.1)
NOW_S = 1_000.0
BUDGET_TOKENS = 2_048


@dataclass(eq=False)
class Held:
    """A stand-in for vLLM's request."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    tiergate_due: Due = NO_PROMISE
    priority: int = 0
    arrival_time: float = 0.0
    max_tokens: int = 100_000
    num_output_placeholders: int = 0
    is_prefill_chunk: bool = False
    spec_token_ids: list[int] = field(default_factory=list)
    kv_transfer_params: dict[str, object] | None = None
    tokens: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    tiergate_first_s: float = 0.0
    tiergate_pace_s: float = 0.0

    def __post_init__(self) -> None:
        promise(self, self.tiergate_due)
        # vLLM's request has some sixty attributes, more than Python keeps in an object without a dictionary.
        for number in range(50):
            setattr(self, f"other_{number}", None)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.outputs)


@dataclass
class Output:
    """A stand-in for what vLLM scheduled."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scene:
    """What an engine holds before a step."""

    name: str
    situation: Situation
    output: Output
    requests: dict[str, Held]


def decode(number: int, chance: random.Random, slack_s: float) -> Held:
    """A stream some way into its answer, whose next token is due in `slack_s`."""
    prompt, made = chance.randint(100, 2_000), chance.randint(2, 400)
    pace_s = chance.choice(PACES_S)
    due = Due(NOW_S + slack_s - made * pace_s, pace_s)
    tokens = [7] * (prompt + made)
    return Held(f"d{number}", prompt, prompt + made - 1, due, tokens=tokens, outputs=[7] * made)


def waiting(number: int, tokens: int, due_s: float, computed: int = 0) -> Held:
    """One that waits, or is being served when something of it is computed."""
    due = Due(NOW_S + due_s, 0.05)
    return Held(f"p{number}", tokens, computed, due, tokens=[7] * tokens, is_prefill_chunk=computed > 0)


def scene(decodes: int, queued: int, *, tight: bool = False) -> Scene:
    """`decodes` streams, a prompt being served, and `queued` ones behind it. `tight`: a stream's next token is due
    before a step of all streams would end, so that others are left out of it."""
    chance = random.Random(decodes * 1_000 + queued)
    streams = [decode(number, chance, chance.uniform(0.05, 2.0)) for number in range(decodes)]
    if tight:
        streams[0] = decode(0, chance, 0.003)
    serving = waiting(0, 4_000, 1.0, 512)
    queue = [waiting(number, chance.randint(50, 400), chance.uniform(0.3, 3.0)) for number in range(1, 1 + queued)]
    served = {one.request_id: 1 for one in streams} | {"p0": 300}
    name = f"{decodes} decodes, {queued} queued" + (", a token due at once" if tight else "")
    return Scene(
        name,
        Situation(
            [*streams, serving], [], DeadlineQueue(queue), BUDGET_TOKENS, 512, free_blocks=100_000, drafts=False
        ),
        Output(served, sum(served.values())),
        {one.request_id: one for one in (*streams, serving)},
    )


def best_us(call: Callable[[], object], times: int, rounds: int) -> float:
    """The least CPU time of a call, over rounds of `times` calls."""
    best_s = float("inf")
    for _ in range(rounds):
        start_s = time.thread_time()
        for _ in range(times):
            call()
        best_s = min(best_s, time.thread_time() - start_s)
    return best_s / times * 1e6


def bare() -> float:
    """The unit of the machine's speed: a loop over a hundred numbers."""
    total = 0.0
    for number in range(100):
        total += number * 0.5
    return total


def cost_us(what: Scene, step_time: StepTime, times: int, rounds: int) -> tuple[float, float]:
    """Microseconds of a step's plan, and of the note of it."""
    pilot = Pilot(FactsRing("bench"))
    pilot.order(Orders(Mode.DRIVEN, step_time, Rules(margin=1.05)), NOW_S)

    held = pilot.turn(what.situation, NOW_S).held

    def note() -> None:
        pilot.scheduled(what.output, what.requests, (BUDGET_TOKENS, 0), NOW_S, held)
        pilot.came_back(what.output, NOW_S)

    return (
        best_us(lambda: pilot.turn(what.situation, NOW_S), times, rounds),
        best_us(note, times, rounds),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each scene."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_cost", description=__doc__)
    parser.add_argument("--profile", default="h200-llama-3.1-8b-bf16")
    parser.add_argument("--times", type=int, default=100, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    step_time = load(args.profile).step_time
    unit_us = best_us(bare, args.times, args.rounds)
    print(f"best of {args.rounds} rounds of {args.times} steps; a bare loop takes {unit_us:.2f} us")
    print(f"shares are of a step of 5 ms, and of what such a step takes by the profile {args.profile}")
    print(
        f"{'':48}{'plan us':>9}{'note us':>9}{'both':>8}{'in bare loops':>15}{'of 5 ms':>9}"
        f"{'its own':>10}{'of that':>9}"
    )
    scenes = [scene(decodes, queued) for decodes in DECODES for queued in QUEUES]
    scenes += [scene(decodes, 8, tight=True) for decodes in DECODES]
    for what in scenes:
        plan_us, note_us = cost_us(what, step_time, args.times, args.rounds)
        both = plan_us + note_us
        share = both * 1e-6 / STEP_S
        own_s = step_time.seconds(step_of(what.output, what.requests))
        own = both * 1e-6 / own_s
        mark = "" if share < SHARE else f"  above {SHARE:.0%} of 5 ms"
        print(
            f"{what.name:48}{plan_us:9.1f}{note_us:9.1f}{both:8.1f}{both / unit_us:15.1f}{share:9.2%}"
            f"{own_s * 1e3:7.1f} ms{own:9.2%}{mark}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
