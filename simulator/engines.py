"""One engine on the virtual clock: `tiergate_engine.model` stepping by itself, and when its tokens came.

All decodes of an engine get one token a step, so the times of a stream's tokens are a stretch of the engine's own
step ends (several, when it was preempted). Nothing is done per token: a stream is judged by one vector operation
when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scheduling.tiers import Slo
from simulator.agenda import Agenda
from tiergate_engine.control import Mode
from tiergate_engine.model import Emitted, EngineModel, SequenceSpec
from tiergate_engine.ordered import Ordered

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """When a stream's tokens came, in the terms by which it is judged.

    `slack_s` is the least time any token came before its deadline; None without a promise or a token.
    """

    tokens: int
    first_s: float | None
    last_s: float | None
    slack_s: float | None


class Stream:
    """One sequence on an engine. `milestones` are (token index, number of the step it came from); `told`: whether
    its tokens are told as they come."""

    __slots__ = ("lease_id", "milestones", "told")

    def __init__(self, lease_id: str, told: bool) -> None:
        self.lease_id = lease_id
        self.told = told
        self.milestones: list[tuple[int, int]] = []


@dataclass(frozen=True, slots=True)
class Look:
    """Streams that got tokens since the last look, with the tokens they have by now.

    Attributes:
        steps: ended since the last look.
        even_s: mean time of those steps.
        gaps_s: mean gap between tokens of each stream that had one at the last look; None when every step gave
            everybody a token, so that all gaps are `even_s`.
    """

    moved: list[tuple[str, int]]
    steps: int
    even_s: float
    gaps_s: dict[str, float] | None

    def step_s(self, moved: Sequence[tuple[str, int]]) -> float | None:
        """The median gap of some of the streams; None when all of them are new."""
        if self.gaps_s is None:
            return self.even_s if any(tokens > self.steps for _, tokens in moved) else None
        gaps = [self.gaps_s[lease_id] for lease_id, _ in moved if lease_id in self.gaps_s]
        return median(gaps) if gaps else None


class Listener(Protocol):
    """Who is told what an engine does. Calls come at the end of a step, the next one is planned already."""

    def first_token(self, lease_id: str) -> None: ...

    def finished(self, lease_id: str, tokens: int) -> None: ...


class SimEngine:
    """One engine. `pace_s` is asked before every step; None leaves the token budget static.

    Attributes:
        ordered: what it was told while it runs, with `takes_orders`; else None.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], EngineModel],
        agenda: Agenda,
        listener: Listener,
        pace_s: Callable[[], float | None] | None = None,
        *,
        takes_orders: bool = False,
    ) -> None:
        self.name = name
        self.model = make()
        self.ordered = Ordered(self.model) if takes_orders else None
        self.streams: dict[str, Stream] = {}
        self.alive = True
        self.slowness = 1.0
        self.step_s: float | None = None
        self.last_step_s = 0.0
        self.busy_s = 0.0
        self.preempted = 0  # on engines that are gone
        self._make = make
        self._agenda = agenda
        self._listener = listener
        self._pace_s = pace_s
        self._stepping = False
        self._life = 0
        self._whole = 0  # streams of which only the end is told
        self._looked: list[tuple[str, int]] = []
        self._looked_s = 0.0
        self._looked_steps = 0
        self._uneven = False  # a step since the last look left a decode out
        self._paused: dict[str, tuple[int, float]] = {}  # who had got nothing at the last look: tokens, since when
        self._ends_s: _Floats = np.empty(1024)
        self._indices = np.arange(1024, dtype=np.float64)

    @property
    def preemptions(self) -> int:
        return self.preempted + self.model.preemptions

    @property
    def hears_promises(self) -> bool:
        """Whether it keeps what a request that comes now was promised. An engine that takes orders does as long as
        it is driven; any other one has what it was made with."""
        return self.ordered is None or self.ordered.holding(self._agenda.now_s).mode is Mode.DRIVEN

    def submit(self, spec: SequenceSpec, *, streamed: bool = True) -> None:
        """Queue a sequence, and start stepping if the engine stood still. Raises as `EngineModel.submit`.

        Of one that is not `streamed` only the end is told. What comes at one instant is there for the first step.
        """
        self.model.submit(spec, self._agenda.now_s)
        self.streams[spec.sequence_id] = Stream(spec.sequence_id, streamed)
        self._whole += not streamed
        if not self._stepping:
            self._stepping = True
            life = self._life
            self._agenda.soon(lambda: self._start(life))

    def _start(self, life: int) -> None:
        if life == self._life:
            self._step()

    def abort(self, lease_id: str) -> None:
        stream = self.streams.pop(lease_id, None)
        if stream is not None:
            self._whole -= not stream.told
            self.model.abort(lease_id, self._agenda.now_s)

    def crash(self) -> list[Stream]:
        """Lose everything, and be gone until `alive` is set again. Returns what was lost."""
        lost = list(self.streams.values())
        self.alive = False
        self.streams.clear()
        self.preempted += self.model.preemptions
        self.model = self._make()
        self.ordered = None if self.ordered is None else Ordered(self.model)
        self._life += 1
        self._stepping = False
        self._whole = self._looked_steps = 0
        self._looked, self._paused, self._uneven = [], {}, False
        return lost

    def _step(self) -> None:
        model, agenda = self.model, self._agenda
        if self._pace_s is not None:
            model.set_pace(self._pace_s())
        if self.ordered is not None:
            self.ordered.before(agenda.now_s)
        preemptions = model.preemptions
        planned = model.next_step(agenda.now_s)
        if model.held_up or model.preemptions != preemptions:
            self._uneven = True
        self._stepping = planned is not None
        if planned is None:
            return
        self.step_s = planned.duration_s * self.slowness
        life = self._life
        agenda.at(agenda.now_s + self.step_s, lambda: self._step_done(life))

    def _step_done(self, life: int) -> None:
        if life != self._life:
            return  # the engine that ran this step is gone
        model, now_s = self.model, self._agenda.now_s
        emitted = model.finish_step_milestones(now_s)
        number = model.steps
        if number >= len(self._ends_s):
            self._ends_s = np.concatenate([self._ends_s, np.empty(len(self._ends_s))])
        self._ends_s[number] = now_s
        self.last_step_s = now_s
        self.busy_s += self.step_s or 0.0
        self._step()
        streams = self.streams
        whole: tuple[Emitted, ...] = ()
        for token in emitted:
            lease_id = token.sequence_id
            stream = streams[lease_id]
            self._uneven |= len(stream.milestones) > 0 and not token.finished  # it is back from a pause
            stream.milestones.append((token.index, number))
            if not stream.told:
                whole += (token,) if token.finished else ()
                continue
            if token.index == 0:
                self._listener.first_token(lease_id)
            if token.finished:
                self._listener.finished(lease_id, token.index + 1)
        for token in whole:  # an answer in one piece is written when all tokens of the step are out
            self._listener.finished(token.sequence_id, token.index + 1)

    def progress(self) -> list[tuple[str, int]]:
        """Every stream that decodes, with its tokens so far."""
        return self.model.decode_progress()

    def look(self) -> Look | None:
        """The streams that got tokens since the last look; None when none did.

        What a gateway sees of steps is what came out of them: how long the one in flight takes is not told.
        """
        model, last_s = self.model, self.last_step_s
        if model.steps == self._looked_steps:
            return None
        before_s, before, steps = self._looked_s, self._looked, model.steps - self._looked_steps
        self._looked_s, self._looked_steps = last_s, model.steps
        progress = self.model.decode_progress()
        if self._uneven:
            progress += model.preempted_progress()
        if self._whole:
            streams = self.streams
            progress = [one for one in progress if streams[one[0]].told]
        self._looked = progress
        if not self._uneven:
            return Look(progress, steps, (last_s - before_s) / steps, None)
        self._uneven = model.held_up > 0
        return self._look_closely(progress, dict(before), before_s)

    def _look_closely(self, progress: list[tuple[str, int]], before: dict[str, int], before_s: float) -> Look:
        """A look after steps that left somebody out: everybody's gap is their own."""
        moved: list[tuple[str, int]] = []
        gaps: dict[str, float] = {}
        paused: dict[str, tuple[int, float]] = {}
        for lease_id, tokens in progress:
            seen = self._paused.get(lease_id)
            if seen is None and lease_id in before:
                seen = before[lease_id], before_s
            if seen is not None and seen[0] == tokens:
                paused[lease_id] = seen
                continue
            moved.append((lease_id, tokens))
            if seen is not None:
                gaps[lease_id] = (self.last_step_s - seen[1]) / (tokens - seen[0])
        self._paused = paused
        return Look(moved, 0, 0.0, gaps)

    def close(self, lease_id: str, arrival_s: float, slo: Slo) -> StreamTimes:
        """Forget a stream that ended, and say how it went."""
        stream = self.streams.pop(lease_id)
        self._whole -= not stream.told
        milestones = stream.milestones
        if not milestones:
            return StreamTimes(0, None, None, None)
        ends_s = self._ends_s
        last_index, last_step = milestones[-1]
        slack_s = None
        if slo.ttft_s is not None:
            base_s, tpot_s = arrival_s + slo.ttft_s, slo.tpot_s
            slack_s = base_s - float(ends_s[milestones[0][1]])
            if tpot_s is not None and last_index:
                slack_s = min(slack_s, self._least_slack_s(milestones, base_s, tpot_s))
        return StreamTimes(last_index + 1, float(ends_s[milestones[0][1]]), float(ends_s[last_step]), slack_s)

    def _least_slack_s(self, milestones: list[tuple[int, int]], base_s: float, tpot_s: float) -> float:
        """The least slack of any token: between two milestones, one token a step."""
        least_s = np.inf
        for place, (index, step) in enumerate(milestones):
            if place + 1 < len(milestones):
                count = min(milestones[place + 1][0] - index, milestones[place + 1][1] - step)
            else:
                count = 1
            while count > len(self._indices):
                self._indices = np.arange(2 * len(self._indices), dtype=np.float64)
            due_s = self._indices[:count] * tpot_s - self._ends_s[step : step + count]
            least_s = min(least_s, float(due_s.min()) + base_s + index * tpot_s)
        return least_s
