"""One engine on the virtual clock: `tiergate_engine.model` stepping by itself, and when its tokens came.

All decodes of an engine get one token a step, so the times of a stream's tokens are a stretch of the engine's own
step ends (several, when it was preempted). Nothing is done per token: a stream is judged by one vector operation
when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scheduling.tiers import Slo
from simulator.agenda import Agenda
from tiergate_engine.model import EngineModel, SequenceSpec

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
    """One sequence on an engine. `milestones` are (token index, number of the step it came from)."""

    __slots__ = ("lease_id", "milestones")

    def __init__(self, lease_id: str) -> None:
        self.lease_id = lease_id
        self.milestones: list[tuple[int, int]] = []


class Listener(Protocol):
    """Who is told what an engine does. Calls come at the end of a step, the next one is planned already."""

    def first_token(self, lease_id: str) -> None: ...

    def finished(self, lease_id: str, tokens: int) -> None: ...


class SimEngine:
    """One engine. `pace_s` is asked before every step; None leaves the token budget static."""

    def __init__(
        self,
        name: str,
        make: Callable[[], EngineModel],
        agenda: Agenda,
        listener: Listener,
        pace_s: Callable[[], float | None] | None = None,
    ) -> None:
        self.name = name
        self.model = make()
        self.streams: dict[str, Stream] = {}
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
        self._ends_s: _Floats = np.empty(1024)
        self._indices = np.arange(1024, dtype=np.float64)

    @property
    def preemptions(self) -> int:
        return self.preempted + self.model.preemptions

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence, and start stepping if the engine stood still. Raises as `EngineModel.submit`."""
        self.model.submit(spec, self._agenda.now_s)
        self.streams[spec.sequence_id] = Stream(spec.sequence_id)
        if not self._stepping:
            self._step()

    def abort(self, lease_id: str) -> None:
        if self.streams.pop(lease_id, None) is not None:
            self.model.abort(lease_id, self._agenda.now_s)

    def crash(self) -> list[str]:
        """Lose everything; the leases that were lost. It comes back empty."""
        lost = list(self.streams)
        self.streams.clear()
        self.preempted += self.model.preemptions
        self.model = self._make()
        self._life += 1
        self._stepping = False
        return lost

    def _step(self) -> None:
        model, agenda = self.model, self._agenda
        if self._pace_s is not None:
            model.set_pace(self._pace_s())
        planned = model.next_step(agenda.now_s)
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
        for token in emitted:
            lease_id = token.sequence_id
            streams[lease_id].milestones.append((token.index, number))
            if token.index == 0:
                self._listener.first_token(lease_id)
            if token.finished:
                self._listener.finished(lease_id, token.index + 1)

    def progress(self) -> list[tuple[str, int]]:
        """Every stream that decodes, with its tokens so far."""
        return self.model.decode_progress()

    def close(self, lease_id: str, arrival_s: float, slo: Slo) -> StreamTimes:
        """Forget a stream that ended, and say how it went."""
        stream = self.streams.pop(lease_id)
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
