"""What goes wrong, when, and to whom: drawn from a seed ahead of time, then done."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from tests.chaos.process import Actor


class Harm(Enum):
    """What is done to an actor."""

    KILL = "kill -9"
    PAUSE = "SIGSTOP"


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s` of the run something happens to `target`; after `for_s` it is started again, or goes on."""

    at_s: float
    harm: Harm
    target: str
    for_s: float

    def __str__(self) -> str:
        return f"{self.at_s:6.1f} s  {self.harm.value:8} {self.target}, for {self.for_s:.1f} s"


@dataclass(frozen=True, slots=True)
class Window:
    """A fault as it was: from wall-clock time `from_s` until the actor was back at `until_s`."""

    fault: Fault
    from_s: float
    until_s: float

    def touches(self, from_s: float, until_s: float) -> bool:
        return self.from_s <= until_s and from_s <= self.until_s


@dataclass(frozen=True, slots=True)
class Menu:
    """One kind of fault: how often it comes for each target, and how long it lasts (seconds)."""

    harm: Harm
    targets: tuple[str, ...]
    every_s: float
    shortest_s: float
    longest_s: float


def draw_faults(seed: int, from_s: float, until_s: float, menus: Sequence[Menu], most_down: int) -> list[Fault]:
    """Faults by their times. One actor has one trouble at a time, and at most `most_down` actors have any: a fault
    that finds no room comes later, or not at all when the time is up."""
    rng = random.Random(f"{seed}:faults")
    drawn: list[Fault] = []
    for menu in menus:
        at_s = from_s + rng.uniform(0.0, min(menu.every_s, until_s - from_s))
        while at_s < until_s:
            for_s = min(rng.uniform(menu.shortest_s, menu.longest_s), until_s - at_s)
            drawn.append(Fault(at_s, menu.harm, rng.choice(menu.targets), for_s))
            at_s += for_s + rng.expovariate(1.0 / menu.every_s)
    kept: list[Fault] = []
    for fault in sorted(drawn, key=lambda one: one.at_s):
        late = fault
        while not _has_room(late, kept, most_down):
            late = replace(late, at_s=late.at_s + _LATER_S)
        if late.at_s + late.for_s <= until_s:
            kept.append(late)
    return sorted(kept, key=lambda one: one.at_s)


def _has_room(fault: Fault, others: Sequence[Fault], most_down: int) -> bool:
    beside = [
        one
        for one in others
        if one.at_s < fault.at_s + fault.for_s + _APART_S and fault.at_s < one.at_s + one.for_s + _APART_S
    ]
    return len(beside) < most_down and all(one.target != fault.target for one in beside)


_LATER_S = 0.5
_APART_S = 2.0  # a process needs about so long to start again


async def do_faults(
    faults: Sequence[Fault], actors: Mapping[str, Actor], start_s: float, told: list[Window]
) -> None:
    """Do them on time (`start_s` on the clock of `time.monotonic`), and write down how long each really lasted.
    A fault waits for its actor to be back from the one before."""
    async with asyncio.TaskGroup() as tasks:
        for name, actor in actors.items():
            its = [fault for fault in faults if fault.target == name]
            tasks.create_task(_suffer(its, actor, start_s, told))


async def _suffer(faults: Sequence[Fault], actor: Actor, start_s: float, told: list[Window]) -> None:
    for fault in faults:
        await asyncio.sleep(max(start_s + fault.at_s - time.monotonic(), 0.0))
        await _do(fault, actor, told)


async def _do(fault: Fault, actor: Actor, told: list[Window]) -> None:
    from_s = time.time()
    match fault.harm:
        case Harm.KILL:
            await asyncio.to_thread(actor.kill)
            await asyncio.sleep(fault.for_s)
            await actor.start()
        case Harm.PAUSE:
            actor.pause()
            try:
                await asyncio.sleep(fault.for_s)
            finally:
                actor.resume()
    told.append(Window(fault, from_s, time.time()))
