"""How a driven engine model plans its steps: `tiergate_engine.drive`, at a price that decodes hardly raise.

What the plan asks of all decodes comes from `DueTimes`. They are only looked at one by one in a step that has to
leave some of them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiergate_engine.board import Decode, Listed
from tiergate_engine.drive import (
    Demand,
    Room,
    Ruled,
    demand_of,
    is_late,
    least_step_s,
    longest_s,
    must_end_s,
    room_for,
    served_order,
    step_behind,
    until_first_due,
)
from tiergate_engine.due import DueTimes
from tiergate_engine.fill import Prefill, StepLimits
from tiergate_engine.lockstep import LiveSequence, Lockstep, State
from tiergate_engine.step import Step
from tiergate_engine.waiting import due_s


@dataclass(slots=True, eq=False)
class Plan:
    """A step that is being filled: the prompts as they are served, and what the decodes leave to them."""

    sequences: list[LiveSequence]
    asks: list[Prefill]
    room: Room
    left_out: list[LiveSequence]


class Driver:
    """Plans the steps of one engine whose decodes are `decodes`."""

    def __init__(self, step_time: Ruled, decodes: Lockstep) -> None:
        self.step_time = step_time
        self._decodes = decodes
        self._due = decodes.due = DueTimes()
        self._least_s = least_step_s(step_time)

    def rule(self, step_time: Ruled) -> None:
        """Plan by these rules and step times."""
        self.step_time = step_time
        self._least_s = least_step_s(step_time)

    def promised(self, sequence: LiveSequence, ask: Prefill, now_s: float) -> Prefill:
        """What a sequence asks for, with its promise."""
        return ask._replace(remaining_s=due_s(sequence) - now_s, relegated=sequence.relegated)

    def is_late(self, ask: Prefill) -> bool:
        """Whether a prompt is to be relegated: late even if it had the engine to itself."""
        if not self.step_time.rules.relegate or ask.relegated or math.isinf(ask.remaining_s):
            return False
        return is_late(ask, self.step_time)

    def plan(
        self,
        running: Iterable[LiveSequence],
        sequences: Sequence[LiveSequence],
        asks: Sequence[Prefill],
        limits: StepLimits,
        now_s: float,
    ) -> Plan:
        """Plan the next step for the decodes among `running` and the prompts `sequences`, which ask for `asks`."""
        decodes = self._decodes
        base = Step.decode(decodes.seqs, decodes.kv_tokens + decodes.seqs)  # with the token being computed
        asks, ranks = served_order(asks, base.decode_seqs, limits, self.step_time)
        demand = demand_of(asks, ranks, base.decode_seqs, limits)
        for sequence, ask in zip(sequences, asks, strict=True):
            sequence.relegated |= ask.relegated
        room, left_out = self._room(running, base, demand, limits, now_s)
        room = until_first_due(room, asks, ranks, limits, self.step_time)
        return Plan([sequences[index] for index in ranks], [asks[index] for index in ranks], room, left_out)

    def _room(
        self, running: Iterable[LiveSequence], base: Step, demand: Demand, limits: StepLimits, now_s: float
    ) -> tuple[Room, list[LiveSequence]]:
        """`drive.room_for`, which is only asked when somebody may have to be left out."""
        rules, due, steps = self.step_time.rules, self._due, self._decodes.steps
        most_s = longest_s(limits, rules)
        if not base.decode_seqs:
            return Room(most_s, (), base), []
        decode_s = self.step_time.seconds(base)
        within_s = min(most_s, due.within_s(now_s, steps, decode_s, rules.chunk_from_slack))
        if rules.skip:
            behind_s = self.step_time.seconds(step_behind(base, demand))
            until_s = due.least_slack_s(now_s, steps, self._least_s, decode_s)
            if until_s is None:
                until_s = must_end_s(demand, within_s, behind_s)
                if until_s is not None and self.step_time.seconds(base + demand.first) <= until_s:
                    until_s = None
            else:
                until_s = min(until_s, within_s, demand.remaining_s)
            if until_s is not None and due.most_slack_s(now_s, steps) >= until_s + behind_s:
                return self._look_closely(running, base, demand, limits, now_s)
        return Room(within_s, (), base), []

    def _look_closely(
        self, running: Iterable[LiveSequence], base: Step, demand: Demand, limits: StepLimits, now_s: float
    ) -> tuple[Room, list[LiveSequence]]:
        steps = self._decodes.steps
        live = [sequence for sequence in running if sequence.state is State.DECODE]
        decodes = [
            Decode(self._decodes.kv_of(one) + 1, self._due.slack_s(one, now_s, steps), self._due.pace_s(one))
            for one in live
        ]
        room = room_for(Listed(decodes), base, demand, limits, self.step_time)
        return room, [live[index] for index in room.skipped]
