"""What a backend can be set to, and how a number is kept from flapping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from tiergate_engine.control import Mode, Orders
from tiergate_engine.drive import Rules
from tiergate_engine.step import StepTime


class Rung(Enum):
    """How a backend is kept to its promises, the strongest first."""

    DRIVEN = "driven"  # it plans each step by the slack of those on board
    CHUNK_BUDGET = "chunk_budget"  # the prompt tokens of a step are set, as those on board change
    RUNNING_CAP = "running_cap"  # the sequences that run are capped
    PREFILL_PACING = "prefill_pacing"  # prompts are let in at a rate
    CONCURRENCY_CAP = "concurrency_cap"  # sequences are let in up to a number
    LOOSER_TIER = "looser_tier"  # it cannot keep its tier's pace at all
    UNSET = "unset"  # nothing can be set, or nothing is known


@dataclass(frozen=True, slots=True)
class Means:
    """What can be set on a backend at present: what it was found to take, without what it refused lately.

    Attributes:
        orders: it has the plug-in, and plans its steps itself.
        chunk_budget, running_cap: it takes them while it runs.
        admission: requests may be held back for it.
        chunk_alone: it computes prompts in steps of their own, in which no decode gets a token.
    """

    orders: bool = False
    chunk_budget: bool = False
    running_cap: bool = False
    admission: bool = False
    chunk_alone: bool = False


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """The controller's constants.

    Attributes:
        every_s: how often it is asked.
        lapse_s: an engine obeys its orders so long without another word, then goes on as stock.
        refresh_s: orders that still hold are given again after so long.
        yield_s: orders of another gateway are left alone until they have not been given again for so long.
        raise_after_s: a knob is loosened when that has been right for so long.
        raise_step: and by at least this part of its value.
        profile_step: step times that differ by this part are told to a driven engine.
        floor_tokens: the smallest chunk: prompts go on, however slowly.
        kv_each_tokens: KV a sequence is taken to have where none runs.
        kept: decisions that are remembered, for each backend.
    """

    every_s: float = 0.5
    lapse_s: float = 30.0
    refresh_s: float = 5.0
    yield_s: float = 10.0
    raise_after_s: float = 3.0
    raise_step: float = 0.25
    profile_step: float = 0.05
    floor_tokens: int = 16
    kv_each_tokens: int = 1_000
    kept: int = 16

    @classmethod
    def lapsing(cls, lapse_s: float) -> Self:
        """With orders that lapse after so long. How soon they are renewed, or yielded, follows in proportion."""
        return cls(lapse_s=lapse_s, refresh_s=lapse_s / 6.0, yield_s=lapse_s / 3.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a backend is set to. A number that is None is the engine's own.

    Attributes:
        reason: why, in words, with the numbers it rests on.
        at_s: since when.
        step_time, margin: what a driven engine plans by.
        chunk_tokens: most prompt tokens of a step, on top of its decodes.
        running_cap: most sequences that run.
        prefill_tokens_s: prompt tokens a second that are let in.
        concurrency: most sequences that are let in.
        tier: the looser tier that it could serve.
    """

    rung: Rung
    reason: str
    at_s: float
    step_time: StepTime | None = None
    margin: float = 1.0
    chunk_tokens: int | None = None
    running_cap: int | None = None
    prefill_tokens_s: int | None = None
    concurrency: int | None = None
    tier: str | None = None

    def orders(self, lapse_s: float) -> Orders:
        """The same as orders, for an engine that takes them."""
        if self.rung is Rung.DRIVEN:
            return Orders(Mode.DRIVEN, self.step_time, Rules(margin=self.margin), lapse_s=lapse_s)
        if self.chunk_tokens is None and self.running_cap is None:
            return Orders()
        return Orders(chunk_tokens=self.chunk_tokens, running_cap=self.running_cap, lapse_s=lapse_s)

    def same_as(self, other: Setting) -> bool:
        """Whether both set the same, whatever the reasons."""
        return replace(self, reason=other.reason, at_s=other.at_s) == other


class Knob:
    """A number that is lowered at once, and raised when it was too low by a noticeable step for some time.

    It is never above what was wanted last. Infinity: the engine's own limit.
    """

    __slots__ = ("_least", "_since_s", "value")

    def __init__(self) -> None:
        self.value = math.inf
        self._since_s: float | None = None
        self._least = math.inf

    def follow(self, wanted: float, now_s: float, options: ControlOptions) -> float:
        if wanted <= self.value:
            self.value = wanted
            self._since_s = None
        elif wanted < self.value * (1.0 + options.raise_step):
            self._since_s = None
        elif self._since_s is None:
            self._since_s, self._least = now_s, wanted
        else:
            self._least = min(self._least, wanted)
            if now_s - self._since_s >= options.raise_after_s:
                self.value, self._since_s = self._least, None
        return self.value

    def tokens(self, wanted: float, now_s: float, options: ControlOptions) -> int | None:
        value = self.follow(wanted, now_s, options)
        return None if value == math.inf else int(value)
