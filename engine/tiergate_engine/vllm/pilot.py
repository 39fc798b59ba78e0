"""What a vLLM scheduler is set to for its next step, from what runs and waits in it.

The pilot holds the orders, plans a step and keeps the facts. It changes nothing: `Turn` says what to set for one
step, and the scheduler sets it and puts it back. It knows vLLM by the attributes it reads, not by import.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from tiergate_engine.control import Mode, Orders, StepFact
from tiergate_engine.drive import Ruled, StepPlan, is_late, plan_decodes
from tiergate_engine.fill import Prefill, StepLimits
from tiergate_engine.step import Step
from tiergate_engine.vllm.content import Held, StepOutput, step_of
from tiergate_engine.vllm.drift import Drift
from tiergate_engine.vllm.facts import FactsRing
from tiergate_engine.vllm.promises import EngineRequest, next_due_s
from tiergate_engine.vllm.running import Running, by_want
from tiergate_engine.vllm.waiting import DeadlineQueue

HEADS = 16
"""Queued prompts looked at in a step. More than that many are never admitted in one step that keeps a pace."""
WATCHED_S = 60.0
"""Facts are kept as long as somebody asked for them, or gave orders, within this time."""


class Waiting(Protocol):
    """What is read of vLLM's waiting queues."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[EngineRequest]: ...


@dataclass(frozen=True, slots=True)
class Situation:
    """What a scheduler holds before a step.

    Attributes:
        running: in the engine's own order.
        holding: waiting prompts that hold memory; vLLM admits them before the queue.
        queue: the waiting prompts, in the order in which they would be admitted.
        budget_tokens, running_cap: the engine's own limits.
        held_slots: slots taken by sequences that are not among the running.
        free_blocks: None when the engine's memory is not one pool of blocks.
        drafts: sequences may carry speculative drafts.
    """

    running: Sequence[EngineRequest]
    holding: Waiting
    queue: Waiting
    budget_tokens: int
    running_cap: int
    held_slots: int = 0
    free_blocks: int | None = None
    block_tokens: int = 16
    whole_prompt: bool = True
    drafts: bool = True


@dataclass(frozen=True, slots=True)
class Turn:
    """What to set for one step, and to put back behind it.

    Attributes:
        running: all that run, in the order for this step and those behind it.
        left_out: of those, who is not shown to vLLM in this step.
        budget_tokens: of the whole step.
        running_cap: most sequences among the shown and the newly admitted.
        skipped: decodes among those left out.
        held: what the step will hold if vLLM does as planned; None when that was not reckoned.
    """

    running: list[EngineRequest]
    left_out: frozenset[EngineRequest]
    budget_tokens: int
    running_cap: int
    skipped: int = 0
    held: Held | None = None


@dataclass(slots=True)
class _Calm:
    """When a plan last found decodes only. While nobody is admitted they are the same or fewer, each is due later
    than it was then, and their contexts grow by a token a step."""

    seqs: int
    tokens: int  # of a step of all
    kv_tokens: int
    least_due_s: float


@dataclass(slots=True)
class _Flight:
    """A step that was scheduled and has not come back."""

    output: StepOutput
    step: Step
    scheduled_s: float
    predicted_s: float
    budget_tokens: int
    skipped: int


@dataclass(slots=True)
class Pilot:
    """One engine's orders, plans and facts. All times are of the engine's own clock, in seconds."""

    facts: FactsRing
    orders: Orders = field(default_factory=Orders)
    digest: str | None = None
    given_s: float | None = None
    watched_s: float = -math.inf
    last_budget_tokens: int | None = None
    _ruled: Ruled | None = None
    _drift: Drift = field(default_factory=Drift)
    _calm: _Calm | None = None
    _flights: deque[_Flight] = field(default_factory=deque)
    _back_s: float = -math.inf

    def order(self, orders: Orders, now_s: float, digest: str | None = None) -> None:
        """Obey these from the next step on. `digest`: of the text they came in, which may say more than this."""
        if orders.profile != self.orders.profile:
            self._drift = Drift()
        self.orders, self.given_s, self.watched_s = orders, now_s, now_s
        self.digest = orders.digest if digest is None else digest
        self._calm = None
        self._rule()

    def _rule(self) -> None:
        """Plan by the orders' rules, and by step times with their drift."""
        rules, profile = self.orders.rules, self.orders.profile
        drifted = replace(rules, margin=rules.margin * self._drift.factor)
        self._ruled = None if profile is None else Ruled(drifted, profile)

    def watch(self, now_s: float) -> None:
        """Somebody asked for facts."""
        self.watched_s = now_s

    def lapsed(self, now_s: float) -> bool:
        """Whether the orders' time is over."""
        lapse_s = self.orders.lapse_s
        return self.given_s is not None and lapse_s is not None and now_s - self.given_s > lapse_s

    def mode(self, now_s: float) -> Mode:
        """What is done at present."""
        return Mode.STOCK if self.given_s is None or self.lapsed(now_s) else self.orders.mode

    def by_deadline(self, now_s: float) -> bool:
        """Whether the waiting queue is to stand by deadline."""
        return self.mode(now_s) is Mode.DRIVEN and self.orders.rules.deadline_order

    def commands(self, now_s: float) -> bool:
        """Whether there is anything to set at all."""
        if self.given_s is None or self.lapsed(now_s):
            return False
        orders = self.orders
        return orders.mode is Mode.DRIVEN or orders.chunk_tokens is not None or orders.running_cap is not None

    # --- before a step

    def nothing_to_weigh(self, seqs: int, now_s: float) -> bool:
        """Whether the next step needs no plan: `seqs` decodes that all have time, and nobody waits.

        To be asked only when nobody waits. Most steps are such, and it costs them a microsecond or two.
        """
        calm = self._calm
        if calm is None or seqs > calm.seqs:
            return False
        calm.kv_tokens += calm.tokens
        orders = self.orders
        if orders.mode is not Mode.DRIVEN or self._ruled is None or not orders.rules.skip:
            return True
        decode_s = self._ruled.decode_seconds(calm.seqs, calm.kv_tokens)
        return calm.least_due_s - self.free_s(now_s) >= decode_s

    def look_again(self) -> None:
        """The next step is to be planned, whatever the last plan found."""
        self._calm = None

    def turn(self, situation: Situation, now_s: float) -> Turn:
        """What to set for the next step under the orders in force."""
        self.look_again()
        free_s = self.free_s(now_s)
        running = by_want(situation.running, free_s, drafts=situation.drafts)
        cap = situation.running_cap
        if self.orders.running_cap is not None:
            cap = min(cap, self.orders.running_cap)
        budget = situation.budget_tokens
        if self.orders.chunk_tokens is not None:
            budget = min(budget, running.decode_tokens + self.orders.chunk_tokens)
        if self.orders.mode is Mode.DRIVEN and self._ruled is not None:
            turn = self._driven(situation, running, (budget, cap), self._ruled, free_s)
        else:
            turn = Turn(running.done + running.decodes + running.prefills, frozenset(), budget, cap)
        self.last_budget_tokens = turn.budget_tokens
        if not running.prefills and not len(situation.queue) and not len(situation.holding):
            due_s = running.least_slack_s + free_s
            self._calm = _Calm(len(situation.running), running.decode_tokens, sum(running.kv_tokens), due_s)
        return turn

    def free_s(self, now_s: float) -> float:
        """When the step that is planned now can begin: with asynchronous scheduling one is still running."""
        free_s = self._back_s
        for flight in self._flights:
            free_s = max(free_s, flight.scheduled_s) + flight.predicted_s * self._drift.factor
        return max(free_s, now_s)

    def _driven(
        self,
        situation: Situation,
        running: Running,
        limits: tuple[int, int],
        ruled: Ruled,
        free_s: float,
    ) -> Turn:
        budget, cap = limits
        free_blocks = situation.free_blocks
        if free_blocks is not None:
            free_blocks -= len(running.decodes)  # at most one each
            if free_blocks < 0:
                free_blocks = 0
                ruled = Ruled(replace(ruled.rules, skip=False), ruled.base)  # vLLM must see whom it may preempt
        slots = max(cap - len(situation.running) - situation.held_slots, 0)
        prompts = list(running.prefills)
        asks = [_prefill(one, free_s, True) for one in prompts]
        _add_heads(prompts, asks, situation, (budget, slots), free_s, ruled)
        if not prompts:
            decode_s = ruled.decode_seconds(len(running.decodes), sum(running.kv_tokens))
            if not ruled.rules.skip or running.least_slack_s >= decode_s:  # most steps are such
                return Turn(running.done + running.decodes, frozenset(), budget, cap, 0, running.held([]))
        allowed = StepLimits(budget, slots, free_blocks, situation.block_tokens, situation.whole_prompt)
        plan = plan_decodes(running, asks, allowed, ruled)
        return _turn_of(plan, running, prompts, budget, cap)

    # --- behind a step

    def scheduled(
        self,
        output: StepOutput,
        requests: Mapping[str, EngineRequest],
        set_to: tuple[int, int],
        began_s: float,
        held: Held | None = None,
    ) -> None:
        """A step was scheduled. `set_to`: its budget, and the decodes skipped; `held`: of its `Turn`."""
        if not output.num_scheduled_tokens:
            return
        step = step_of(output, requests, held)
        profile = self.orders.profile
        predicted_s = 0.0 if profile is None else profile.seconds(step)
        self._flights.append(_Flight(output, step, began_s, predicted_s, *set_to))

    def came_back(self, output: StepOutput, now_s: float) -> None:
        """A step's outputs were taken in. Steps come back in the order in which they were scheduled; those that
        held nothing, or that nobody watched, are not known here."""
        if any(flight.output is output for flight in self._flights):
            while (flight := self._flights.popleft()).output is not output:
                pass
            began_s = max(flight.scheduled_s, self._back_s)
            self.facts.add(StepFact(flight.step, now_s - began_s, flight.budget_tokens, flight.skipped))
            if self._drift.note(now_s - began_s, flight.predicted_s):
                self._rule()
        self._back_s = now_s

    def watching(self, now_s: float) -> bool:
        """Whether facts are kept: somebody asked lately, or they are needed to plan."""
        return now_s - self.watched_s <= WATCHED_S or self.mode(now_s) is Mode.DRIVEN


def _add_heads(
    prompts: list[EngineRequest],
    asks: list[Prefill],
    situation: Situation,
    limits: tuple[int, int],
    free_s: float,
    ruled: Ruled,
) -> None:
    """Add the prompts that vLLM would admit next, and what they ask for, as far as a step's `limits` go, which are
    tokens and slots: those that hold memory already, then the head of the queue.

    Prompts that can no longer be on time are put behind the others on the way, for good: the plan judges them the
    same way, and vLLM's order has to be the plan's.
    """
    tokens, slots = limits
    queue = situation.queue
    if not slots or not (len(queue) or len(situation.holding)):
        return
    heads = list(situation.holding)
    asked = [_prefill(one, free_s, False) for one in heads]
    if not isinstance(queue, DeadlineQueue):
        heads += islice(queue, HEADS)
        asked += [_prefill(one, free_s, False) for one in heads[len(asked) :]]
    else:
        judged = queue.first(HEADS)
        again = False
        for one in judged:
            if queue.given_up(one):
                again = True
                break
            ask = _prefill(one, free_s, False)
            if ruled.rules.relegate and is_late(ask, ruled):
                queue.give_up(one)
                again = True
                continue
            heads.append(one)
            asked.append(ask)
            tokens -= ask.tokens
            slots -= 1
            if tokens <= 0 or not slots:
                again = False
                break
        if again:
            judged = queue.first(HEADS)
            holding = len(situation.holding)
            heads[holding:] = judged
            asked[holding:] = [
                _prefill(one, free_s, False)._replace(relegated=True)
                if queue.given_up(one)
                else _prefill(one, free_s, False)
                for one in judged
            ]
    prompts += heads
    asks += asked


def _prefill(one: EngineRequest, free_s: float, admitted: bool) -> Prefill:
    computed = one.num_computed_tokens
    tokens = max(one.num_tokens + one.num_output_placeholders - computed, 1)
    transfer = one.kv_transfer_params
    if transfer and not admitted and transfer.get("do_remote_prefill"):
        computed, tokens = (
            computed + tokens - 1,
            1,
        )  # another engine computed the rest: only its last token is left
    return Prefill(tokens, computed, admitted, next_due_s(one) - free_s, one.tiergate_due.relegated)


def _turn_of(plan: StepPlan, running: Running, prompts: Sequence[EngineRequest], budget: int, cap: int) -> Turn:
    """What to set so that vLLM, which serves its running in order and then its queue, does what was planned."""
    admitted = len(running.prefills)
    skipped = {running.decodes[index] for index in plan.skipped}
    served = [index for index in plan.order if plan.chunks[index]]
    # vLLM gives what is left to running prompts first, so one behind a queued prompt must not be seen by it
    first_queued = next((rank for rank, index in enumerate(served) if index >= admitted), len(served))
    shown = {prompts[index] for index in served[:first_queued]}
    queued = first_queued < len(served)
    left_out = {one for one in running.prefills if one not in shown} if queued else set()
    prompt_tokens = sum(plan.chunks[index] for index in served if not queued or prompts[index] not in left_out)
    skipped_tokens = sum(1 + len(one.spec_token_ids) for one in skipped)
    tokens = running.decode_tokens - skipped_tokens + prompt_tokens
    if not tokens and (running.decodes or prompts):
        # a step of nothing would be planned again and again
        skipped, left_out, tokens = set(), set(), max(running.decode_tokens, 1)
    ordered = [prompts[index] for index in plan.order if index < admitted]
    everybody = running.done + running.decodes + ordered
    out = frozenset(skipped | left_out)
    held = running.held(prompts, plan.skipped if skipped else ())
    return Turn(everybody, out, max(min(tokens, budget), 1), cap - len(out), len(skipped), held)
