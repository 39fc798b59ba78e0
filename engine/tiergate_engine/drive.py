"""What a driven engine does in a step that a stock one does not: the slack on board sets the step's length.

A sequence's promise is the time its first token is due and a pace: token i is due at ``first_due + i * pace``
(PolyServe §2.3). A decode's *slack* is the time until its next token is due, so tokens that came early bank slack,
and a prompt's chunk may spend it. Pure and small: it runs inside an engine's scheduler, once a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from tiergate_engine.board import Decode, Decodes, Listed
from tiergate_engine.fill import Order, Prefill, StepLimits, fill, ranked
from tiergate_engine.step import Step, StepTime

_REMEMBERED = 4096  # lengths of prompts, with the time of a step of each


@dataclass(frozen=True, slots=True)
class Rules:
    """How an engine is driven. The flags switch one mechanism each.

    Attributes:
        margin: predicted step times are multiplied by it, at least 1.
        host_step_s: host time of a step that the profile does not contain.
        host_seq_s: the same for each sequence in the step.
        chunk_from_slack: a step may last as long as the least slack on board; else as long as the tightest pace
            on board (PolyServe §4.7).
        deadline_order: prompts by the time their first token is due; else in the order given.
        skip: decodes with time to spare may be left out of a step when that makes a tight token on time.
        relegate: a prompt that can no longer be on time is served after those that can.
        floor_tokens: prompt tokens of a step without decodes, when no prompt would otherwise get any.
        longest_s: no chunk makes a step longer than this, whatever slack there is, so that a newcomer soon has its
            turn; None: no such limit.

    Raises:
        ValueError: a number is out of range.
    """

    margin: float = 1.0
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    chunk_from_slack: bool = True
    deadline_order: bool = True
    skip: bool = True
    relegate: bool = True
    floor_tokens: int = 16
    longest_s: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 1.0):
            raise ValueError(f"margin is {self.margin!r}: it is a finite number of at least 1")
        for name in ("host_step_s", "host_seq_s"):
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value!r}: it is a finite number of seconds, at least 0")
        if self.floor_tokens < 1:
            raise ValueError(f"floor_tokens is {self.floor_tokens}: it must be at least 1")
        if self.longest_s is not None and not (math.isfinite(self.longest_s) and self.longest_s > 0.0):
            raise ValueError(f"longest_s is {self.longest_s!r}: it is a positive number of seconds or None")


class Ruled:
    """A step time as an engine is to reckon by its rules: with their margin and the host's time."""

    __slots__ = ("_prompts_s", "base", "rules")

    def __init__(self, rules: Rules, base: StepTime) -> None:
        self.rules = rules
        self.base = base
        self._prompts_s: dict[int, float] = {}

    def prompt_seconds(self, tokens: int, context_tokens: int) -> float:
        """A step of one chunk alone. Prompts that wait are asked for in every step, so theirs are remembered."""
        if context_tokens:
            return self.seconds_of(tokens, 1, context_tokens, tokens * (context_tokens + tokens / 2), 0, 0)
        known_s = self._prompts_s.get(tokens)
        if known_s is None:
            if len(self._prompts_s) >= _REMEMBERED:
                self._prompts_s.clear()
            known_s = self._prompts_s[tokens] = self.seconds_of(tokens, 1, 0, tokens * (tokens / 2), 0, 0)
        return known_s

    def seconds(self, step: Step) -> float:
        """See `StepTime`."""
        return self._with_host(self.base.seconds(step), step.decode_seqs + step.prefill_seqs)

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """See `StepTime`."""
        step_s = self.base.seconds_of(
            prefill_tokens, prefill_seqs, prefill_context_tokens, prefill_attention, decode_seqs, decode_kv_tokens
        )
        return self._with_host(step_s, decode_seqs + prefill_seqs)

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """See `StepTime`."""
        return self._with_host(self.base.decode_seconds(decode_seqs, decode_kv_tokens), decode_seqs)

    def chunk_tokens(self, base: Step, within_s: float, context_tokens: int, limit_tokens: int) -> int:
        """See `StepTime`."""
        within_s -= self._with_host(0.0, base.decode_seqs + base.prefill_seqs + 1)
        return self.base.chunk_tokens(base, within_s / self.rules.margin, context_tokens, limit_tokens)

    def _with_host(self, step_s: float, seqs: int) -> float:
        rules = self.rules
        return rules.margin * step_s + rules.host_step_s + rules.host_seq_s * seqs


class StepPlan(NamedTuple):
    """What the next step should be.

    Attributes:
        within_s: how long the step may take; infinite when nobody on board has a promise.
        skipped: indices of the decodes that are left out of this step.
        order: indices of the prefills as they are served, relegated ones last.
        chunks: tokens of each prefill, aligned with the prefills given.
        tokens: the whole step's token budget: its decodes and its chunks.
        relegated: indices of the prefills that were given up in this step. Their promise holds no more: from then
            on they are `Prefill.relegated`, and decodes without a promise behind it.
    """

    within_s: float
    skipped: tuple[int, ...]
    order: tuple[int, ...]
    chunks: list[int]
    tokens: int
    relegated: tuple[int, ...] = ()


class Room(NamedTuple):
    """What the decodes leave to the prompts.

    Attributes:
        within_s: how long the step may take; infinite when nobody on board has a promise.
        skipped: indices of the decodes that are left out, in no order.
        served: the decodes that are not.
    """

    within_s: float
    skipped: tuple[int, ...]
    served: Step


class Demand(NamedTuple):
    """What prompts ask of a step.

    Attributes:
        first: all that is left of the one that is served first, when it has a promise; else nothing.
        remaining_s: until its first token is due.
        seqs, kv_tokens: how many may become decodes at the end of the step, and their contexts.
    """

    first: Step
    remaining_s: float
    seqs: int
    kv_tokens: int


def plan_step(
    decodes: Sequence[Decode],
    prefills: Sequence[Prefill],
    limits: StepLimits,
    rules: Rules,
    step_time: StepTime,
) -> StepPlan:
    """`plan_decodes` for decodes and step times as they are given."""
    return plan_decodes(Listed(decodes), prefills, limits, Ruled(rules, step_time))


def plan_decodes(decodes: Decodes, prefills: Sequence[Prefill], limits: StepLimits, ruled: Ruled) -> StepPlan:
    """Plan the next step. `limits` are the engine's own; a `within_s` in them holds beside the slack's.

    1. The step may last until the first token on board is due (`chunk_from_slack`): a decode's next one, or the
       first one of a prompt that ends in it. A decode that would be late even in a step without chunks binds it
       with its pace only, and one whose pace is shorter than that step not at all.
    2. When the step of all decodes is longer than the slack of one that a shorter step would serve in time, or
       when the first prompt would be on time if it ended in this step, and else late, decodes are left out, the
       loosest first: only as many as are needed, only if it helps, and only such as are still on time in the step
       behind this one. To leave them out saves no work, it is done later; so it is not done just for more room.
    3. Prompts share what is left as `fill` has it, by deadline. One that would be late even if it had the
       engine to itself comes last (after QoServe's eager relegation, ASPLOS 2026).
    """
    kv_tokens = decodes.kv_tokens
    seqs = len(kv_tokens)
    base = Step.decode(seqs, sum(kv_tokens))
    asks, ranks = served_order(prefills, seqs, limits, ruled)
    demand = demand_of(asks, ranks, seqs, limits)
    room = until_first_due(room_for(decodes, base, demand, limits, ruled), asks, ranks, limits, ruled)
    queue = [asks[index] for index in ranks]
    shares = fill(room.served, queue, timed(limits, room), step_time=ruled)
    if not room.served.tokens and not any(shares):
        # Nobody decodes and not even one token keeps the time: without a step the engine would never go on.
        shares = fill(room.served, queue, replace(limits, tokens=ruled.rules.floor_tokens, within_s=None))
    chunks = [0] * len(asks)
    for index, chunk in zip(ranks, shares, strict=True):
        chunks[index] = chunk
    lost = [i for i, one in enumerate(asks) if one.relegated and not prefills[i].relegated]
    tokens = room.served.decode_seqs + sum(chunks)
    return StepPlan(room.within_s, room.skipped, tuple(ranks), chunks, tokens, tuple(lost))


def served_order(
    prefills: Sequence[Prefill], decode_seqs: int, limits: StepLimits, ruled: Ruled
) -> tuple[Sequence[Prefill], Sequence[int]]:
    """The prompts with those relegated that are late anyway (`is_late`), and the order in which they are served.

    Only as many are looked at as the limits give a slot and a token behind the decodes.
    """
    order = Order.DEADLINE if ruled.rules.deadline_order else Order.GIVEN
    ranks = ranked(prefills, order)
    if not ruled.rules.relegate:
        return prefills, ranks
    late: list[int] = []
    wanted = limits.tokens - decode_seqs
    slots = math.inf if limits.new_seqs is None else limits.new_seqs
    for index in ranks:
        one = prefills[index]
        if wanted <= 0 or one.relegated:
            break
        if not one.admitted and slots <= 0:
            continue
        if one.remaining_s < math.inf and is_late(one, ruled):
            late.append(index)
        else:
            wanted -= one.tokens
            slots -= not one.admitted
    if not late:
        return prefills, ranks
    asks = list(prefills)
    for index in late:
        asks[index] = asks[index]._replace(relegated=True)
    return asks, ranked(asks, order)


def is_late(prefill: Prefill, ruled: Ruled) -> bool:
    """Whether its first token would be late even if it had the engine to itself. Who is late stays so: chunks take
    longer together than one of all their tokens."""
    if prefill.remaining_s <= 0.0:
        return True
    return ruled.prompt_seconds(prefill.tokens, prefill.context_tokens) > prefill.remaining_s


def demand_of(asks: Sequence[Prefill], ranks: Sequence[int], decode_seqs: int, limits: StepLimits) -> Demand:
    """What prompts ask of the next step, in the order in which they are served, as far as the limits go."""
    first, remaining_s = Step(), math.inf
    ahead = seqs = kv_tokens = 0
    tokens = limits.tokens - decode_seqs
    slots = math.inf if limits.new_seqs is None else limits.new_seqs
    for index in ranks:
        if ahead >= tokens:
            break
        one = asks[index]
        if not one.admitted:
            if slots <= 0:
                continue
            slots -= 1
        if not ahead and not one.relegated and one.remaining_s < math.inf and one.tokens <= tokens:
            first, remaining_s = Step.chunk(one.tokens, one.context_tokens), one.remaining_s
        ahead += one.tokens
        seqs += 1
        kv_tokens += one.context_tokens + one.tokens
    return Demand(first, remaining_s, seqs, kv_tokens)


def room_for(decodes: Decodes, base: Step, demand: Demand, limits: StepLimits, ruled: Ruled) -> Room:
    """How long the next step may take, and who is left out of it. `base` is the step of all decodes."""
    most_s = longest_s(limits, ruled.rules)
    if not base.decode_seqs:
        return Room(most_s, (), base)
    rules = ruled.rules
    decode_s = ruled.seconds(base)
    least_s = decodes.least_slack_s
    if rules.chunk_from_slack and least_s >= decode_s:
        within_s = min(most_s, least_s)
    else:
        within_s = min(most_s, _within_s(decodes.slacks_s(), decodes.paces_s(), decode_s, rules))
    if not rules.skip:
        return Room(within_s, (), base)
    behind_s = ruled.seconds(step_behind(base, demand))
    tight_s = None
    if least_s < decode_s:
        tight_s = least_within(decodes.slacks_s(), least_step_s(ruled), decode_s)
    if tight_s is not None:
        kv_tokens, slacks_s, paces_s = decodes.kv_tokens, decodes.slacks_s(), decodes.paces_s()
        skipped = _left_out(kv_tokens, slacks_s, base, (tight_s, behind_s), Step(), ruled)
        if skipped:
            served = _without(base, skipped, kv_tokens)
            out = set(skipped)
            rest = [index for index in range(len(kv_tokens)) if index not in out]
            bound_s = _within_s(
                [slacks_s[index] for index in rest],
                [paces_s[index] for index in rest],
                ruled.seconds(served),
                rules,
            )
            return Room(min(most_s, bound_s, tight_s), skipped, served)
    until_s = must_end_s(demand, within_s, behind_s)
    if until_s is not None and ruled.seconds(base + demand.first) > until_s:
        kv_tokens, slacks_s = decodes.kv_tokens, decodes.slacks_s()
        skipped = _left_out(kv_tokens, slacks_s, base, (until_s, behind_s), demand.first, ruled)
        if skipped:
            return Room(until_s, skipped, _without(base, skipped, kv_tokens))
    return Room(within_s, (), base)


def must_end_s(demand: Demand, within_s: float, behind_s: float) -> float | None:
    """How long the step may take when the first prompt has to end in it, since it would be late in the one behind
    it. None when it has time, or none is left to it."""
    if not 0.0 < demand.remaining_s < within_s + behind_s:
        return None
    return min(within_s, demand.remaining_s)


def longest_s(limits: StepLimits, rules: Rules) -> float:
    """How long a step may take whoever is on board."""
    limit_s = math.inf if limits.within_s is None else limits.within_s
    return limit_s if rules.longest_s is None else min(limit_s, rules.longest_s)


def until_first_due(
    room: Room, asks: Sequence[Prefill], ranks: Sequence[int], limits: StepLimits, ruled: Ruled
) -> Room:
    """The room, but no longer than until the first token of a prompt is due that can end in this step: what comes
    behind it in the step would make it late."""
    if not ruled.rules.chunk_from_slack:
        return room
    step, within_s = room.served, room.within_s
    slots = math.inf if limits.new_seqs is None else limits.new_seqs
    for index in ranks:
        one = asks[index]
        if one.relegated or one.remaining_s >= within_s or step.tokens + one.tokens > limits.tokens:
            break
        if not one.admitted:
            if slots <= 0:
                continue
            slots -= 1
        step = step.with_chunk(one.tokens, one.context_tokens)
        step_s = ruled.seconds(step)
        if step_s > within_s:
            break
        if step_s <= one.remaining_s:
            within_s = one.remaining_s
    return room if within_s == room.within_s else room._replace(within_s=within_s)


def _without(base: Step, skipped: Sequence[int], kv_tokens: Sequence[int]) -> Step:
    gone = sum([kv_tokens[index] for index in skipped])
    return Step.decode(base.decode_seqs - len(skipped), base.decode_kv_tokens - gone)


def _within_s(slacks_s: Sequence[float], paces_s: Sequence[float], decode_s: float, rules: Rules) -> float:
    bounds_s = paces_s
    if rules.chunk_from_slack:
        least_s = min(slacks_s)
        if least_s >= decode_s:
            return least_s
        bounds_s = [slack if slack >= decode_s else pace for slack, pace in zip(slacks_s, paces_s, strict=True)]
    # A pace that no step of these decodes keeps is lost; to stop the prompts for it would help nobody.
    return min([bound_s for bound_s in bounds_s if bound_s >= decode_s], default=math.inf)


def step_behind(base: Step, demand: Demand) -> Step:
    """The step behind this one: its decodes, and all prompts that may end in it. Who is left out now has to be on
    time there."""
    return Step.decode(
        base.decode_seqs + demand.seqs, base.decode_kv_tokens + base.decode_seqs + demand.kv_tokens + demand.seqs
    )


def least_within(values: Sequence[float], low: float, high: float) -> float | None:
    """The least of the values in `low` <= value < `high`; None when there is none."""
    return min([value for value in values if low <= value < high], default=None)


def least_step_s(ruled: Ruled) -> float:
    """The shortest step there is: who has less time than that is late whatever is done."""
    return ruled.seconds(Step.decode(1, 1))


def _left_out(
    kv_tokens: Sequence[int],
    slacks_s: Sequence[float],
    base: Step,
    times_s: tuple[float, float],
    chunk: Step,
    ruled: Ruled,
) -> tuple[int, ...]:
    """The fewest decodes, loosest first, without which a step of the others and `chunk` takes no longer than the
    first of `times_s`, while those left out have time for the second one behind it.

    Nobody when even all that may be left out are not enough. Ties as given.
    """
    within_s, behind_s = times_s
    from_s = within_s + behind_s
    loose = [index for index, slack_s in enumerate(slacks_s) if slack_s >= from_s]
    loose.sort(key=slacks_s.__getitem__, reverse=True)
    if len(loose) == base.decode_seqs:
        loose.pop()  # who holds all KV blocks could keep the prompts from using the step
    gone = list(accumulate([kv_tokens[index] for index in loose], initial=0))

    def fits(count: int) -> bool:
        step_s = ruled.seconds_of(
            chunk.prefill_tokens,
            chunk.prefill_seqs,
            chunk.prefill_context_tokens,
            chunk.prefill_attention,
            base.decode_seqs - count,
            base.decode_kv_tokens - gone[count],
        )
        return step_s <= within_s

    low, high = 0, len(loose)  # without `low` of them it does not fit
    if not loose or not fits(high):
        return ()
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return tuple(loose[:high])


def timed(limits: StepLimits, room: Room) -> StepLimits:
    """The limits with the time that the room gives to the step."""
    if room.within_s == math.inf:
        return limits
    # Written out: `dataclasses.replace` costs more than the rest of this file's share in a small step.
    return StepLimits(
        limits.tokens,
        limits.new_seqs,
        limits.free_blocks,
        limits.block_tokens,
        limits.whole_prompt,
        room.within_s,
    )
